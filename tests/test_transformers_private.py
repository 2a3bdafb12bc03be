"""What is used of transformers and is not public: there, of the form expected, and in one file."""

import inspect
import pkgutil
import re
from importlib.metadata import version
from pathlib import Path

import pytest

import isingcut
from isingcut.errors import ModelError
from isingcut.models import transformers_private as private

# (name, what stands first in its signature): by place, because 5.10 renamed an argument.
CALLED = {
    private._MAPPING: ["model", "key_mapping", "hf_quantizer"],
    private._ORDER: ["s"],
    private._RENAME: [
        "source_key",
        "weight_renamings",
        "weight_converters",
        "base_model_prefix",
        "meta_state_dict",
    ],
    f"{private._CONVERTER}.add_tensor": [
        "self",
        "target_key",
        "source_key",
        "source_pattern",
        "future",
    ],
    f"{private._CONVERTER}.convert": ["self", "layer_name", "model", "config"],
    "transformers:PreTrainedModel._get_dtype_plan": ["self", "dtype"],
}


def installed():
    return tuple(map(int, version("transformers").split(".")[:2]))


def test_the_installed_version_is_one_that_was_looked_at():
    assert private.OLDEST <= installed() <= private.NEWEST, (
        f"transformers {version('transformers')} is not among those that {private.__file__} says "
        "are known: read what changed, run the tests of streaming and loading, and say so there"
    )


@pytest.mark.parametrize("name", private.NAMES)
def test_what_is_needed_is_there(name):
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as e:
        pytest.fail(
            f"transformers {version('transformers')} moved or dropped {name}: {e}", pytrace=False
        )


@pytest.mark.parametrize("name", CALLED)
def test_what_is_called_takes_what_it_is_given(name):
    assert name in private.NAMES
    found = list(inspect.signature(pkgutil.resolve_name(name)).parameters)
    wanted = CALLED[name]
    assert found[: len(wanted)] == wanted, (
        f"transformers {version('transformers')} calls the arguments of {name} {found}"
    )


@pytest.mark.parametrize(
    "name",
    [
        "transformers.no_such_module:anything",
        "transformers.core_model_loading:NoSuchThing",
        f"{private._CONVERTER}.no_such_method",
    ],
)
def test_a_name_that_is_gone_is_one_line_that_says_what_to_do(name):
    with pytest.raises(ModelError) as e:
        private.private(name)
    said = str(e.value)
    assert "\n" not in said
    for part in (
        name.replace(":", "."),
        version("transformers"),
        "install one of 5.10 to 5.24",
        "--stream off",
    ):
        assert part in said


def test_no_other_file_uses_what_is_not_public():
    used = re.compile(
        r"transformers\.(conversion_mapping|core_model_loading|modeling_utils|integrations)\b"
        r"|\._(model_mapping|attn_implementation|get_dtype_plan|keys_to_ignore\w*|hf_peft\w*)\b"
    )
    home = Path(isingcut.__file__).parent
    found = {
        path.relative_to(home).as_posix()
        for path in home.rglob("*.py")
        if used.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"models/transformers_private.py"}
