"""The examples in docstrings are true."""

import doctest
import importlib

import pytest

from tests.test_architecture import FILES

WITH_EXAMPLES = [name for name, file in FILES.items() if ">>>" in file.read_text()]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples(name):
    module = importlib.import_module("dpo_lightning." + name.removesuffix(".py").replace("/", "."))
    failed, tried = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried and not failed


def test_there_are_some():
    assert len(WITH_EXAMPLES) >= 5
