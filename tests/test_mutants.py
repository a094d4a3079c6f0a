"""The list of known bugs is up to date: each still has its line in the code, and a test that is there."""

import pytest

from tests.mutants import MUTANTS
from tests.ranks import ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.bug)
def test_each_bug_has_one_place_and_a_test(mutant):
    assert (ROOT / "dpo_lightning" / mutant.file).read_text().count(mutant.good) == 1
    file, _, name = mutant.killed_by.partition("::")
    assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text() if name else (ROOT / file).is_file()
