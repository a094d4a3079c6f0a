"""A user's mistake as lines on the screen, Hydra's own complaints among them."""

from __future__ import annotations

import re
import sys
from typing import NoReturn

from dpo_lightning.cli.secrets import without_passwords
from dpo_lightning.cluster.exits import USER_ERROR
from dpo_lightning.config import CONF, keys_of
from dpo_lightning.keys import nearest


def fail(text: str) -> NoReturn:
    """Print a line for each problem and leave with the exit code of a user's mistake."""
    for line in without_passwords(text).splitlines():
        print(f"error: {line}", file=sys.stderr)
    sys.exit(USER_ERROR)


def explain(error: Exception) -> str:
    """Return Hydra's complaint as one line that names the override, with the nearest key or option."""
    text = str(error)
    if "hydra/sweeper" in text and "optuna" in text:
        return "sweep=: Hydra's sweeper for Optuna is not installed; pip install 'dpo-lightning[sweep]'"
    if found := re.search(r"Could not override '([^']+)'", text):
        return no_such_key(found[1], getattr(error.__cause__, "full_key", found[1]))
    found = re.search(r"(?:An item is already at '|Multiple values for )(\w[\w./]*\w)", text)
    if found and any(arg.startswith(f"+{found[1]}=") for arg in sys.argv):
        return f"+{found[1]}: there is such a key already; leave the + out"
    if found := re.search(r"Could not (?:find|load) '([^'/]+)/([^']+)'", text):
        options = re.findall(r"\t(\S+)", text.partition("Config search path")[0])
        options = options or sorted(file.stem for file in (CONF / found[1]).glob("*.yaml"))
        return f"{found[1]}={found[2]}: no such option{nearest(found[2], options)}; there are {', '.join(options)}"
    if override := getattr(error, "override", None):
        return f"{override}: not of the form key=value; put it in quotes if it has special characters: 'key=\"value\"'"
    text = " ".join(text.split())
    if "Config group override must be" in text:
        given = [arg for arg in sys.argv if re.match(r"\w*=", arg) and (CONF / arg.partition("=")[0]).is_dir()]
        text = f"{' '.join(given)}: a group takes the name of one of its options, for instance lora=none"
    return text or type(error).__name__


def no_such_key(key: str, lacking: str) -> str:
    """Return what to say of a key that the composed configuration does not have, since it has no `lacking`."""
    known = known_keys()
    if key in known and lacking == key.partition(".")[0]:
        return f"{key}: {builds_on_nothing(lacking)}"
    if key in known:
        return f"{key}: the chosen option of {key.partition('.')[0]}= has no such key; choose another or leave it out"
    return f"unknown key {key}{nearest(key, known)}; `--cfg job` prints all keys"


def builds_on_nothing(lacking: str) -> str:
    """Return what helps where a section that every configuration has is not in an own one."""
    return f"the configuration has no {lacking}; give the file of --config-name `defaults: [config, _self_]`"


def known_keys() -> list[str]:
    """Return every key of the default configuration."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return keys_of(compose("config"))
