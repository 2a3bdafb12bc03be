"""Private parts of transformers: they exist, have the expected form, and are in one file."""

import inspect
import pkgutil
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import isingcut
from isingcut.formats import transformers_private as private
from shared import ModelError, cells, parametrize, refuses
from tiny import tiny_model

# Name :: its first parameters, passed by position because 5.10 renamed an argument.
USED = """
transformers.conversion_mapping:get_model_conversion_mapping :: model key_mapping hf_quantizer
transformers.core_model_loading:dot_natural_key :: s
transformers.core_model_loading:rename_source_key :: source_key weight_renamings weight_converters \
base_model_prefix meta_state_dict
transformers.core_model_loading:WeightConverter.add_tensor :: self target_key source_key \
source_pattern future
transformers.core_model_loading:WeightConverter.convert :: self layer_name model config
transformers:PreTrainedModel._get_dtype_plan :: self dtype
transformers.core_model_loading:WeightRenaming ::
transformers:PreTrainedModel._keys_to_ignore_on_load_missing ::
transformers:PreTrainedModel._keys_to_ignore_on_load_unexpected ::
transformers:PreTrainedModel._hf_peft_config_loaded ::
transformers:AutoModelForCausalLM._model_mapping ::
transformers:PreTrainedConfig._attn_implementation ::
transformers:TrainingArguments.n_gpu ::
"""


def installed():
    return tuple(map(int, version("transformers").split(".")[:2]))


def test_the_installed_version_is_one_that_was_looked_at():
    assert private.OLDEST <= installed() <= private.NEWEST, (
        f"transformers {version('transformers')} is not among those that {private.__file__} says "
        "are known: read what changed, run the tests of streaming and loading, and say so there"
    )


@parametrize("name, parameters", cells(USED))
def test_what_is_used_is_there_and_takes_what_it_is_given(name, parameters):
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as e:
        pytest.fail(
            f"transformers {version('transformers')} moved or dropped {name}: {e}",
            pytrace=False,
        )
    wanted = parameters.split()
    assert (
        not wanted or list(inspect.signature(found).parameters)[: len(wanted)] == wanted
    )


def test_a_loader_that_is_gone_is_one_line_that_says_what_to_do(monkeypatch):
    monkeypatch.delattr("transformers.core_model_loading.rename_source_key")
    with refuses(r"install one of 5\.10 to 5\.24, or pass --stream off", ModelError):
        private.Names(tiny_model("llama"), torch.float32)


def test_no_other_file_uses_what_is_not_public():
    used = re.compile(
        r"transformers\.(conversion_mapping|core_model_loading|modeling_utils|integrations)\b"
        r"|\._(model_mapping|attn_implementation|get_dtype_plan|keys_to_ignore\w*|hf_peft\w*)\b"
    )
    home = Path(isingcut.__file__).parent
    found = {
        path.relative_to(home).as_posix()
        for path in home.rglob("*.py")
        if used.search(path.read_text())
    }
    assert found == {"formats/transformers_private.py"}
