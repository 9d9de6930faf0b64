"""register() and unregister(): every change to transformers is known, idempotent and undone exactly."""

import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, CompileConfig

from flash_dmattn_hf import register, unregister
from flash_dmattn_hf.integration import registration

from ..generation_models import greedy, make_model, make_prompt
from ..tiny import tiny_model, tokens

SNAPSHOT = """
import sys, transformers
import transformers.models.doge.modeling_doge, transformers.generation.continuous_batching
from transformers.distributed.tensor_parallel import ParallelInterface
import accelerate

def snapshot():
    found = {}
    for module_name, module in sorted(sys.modules.items()):
        if not module_name.startswith("transformers"):
            continue
        for name, value in vars(module).copy().items():
            found[module_name, name] = id(value)
            if isinstance(value, type) and value.__module__.startswith("transformers"):
                for attribute, inner in vars(value).copy().items():
                    if not attribute.startswith(("__abstract", "_abc_", "__doc__", "__annotations")):
                        found[module_name, name, attribute] = id(inner)
            if type(value) is dict:
                found[module_name, name, "keys"] = tuple(map(str, value))
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface, ParallelInterface):
        found[interface.__name__] = tuple(interface._global_mapping.items())
    return found
"""


def test_unregister_leaves_every_attribute_of_transformers_as_it_was():
    program = SNAPSHOT + textwrap.dedent(
        """
        import flash_dmattn_hf                      # loads every module that it needs
        flash_dmattn_hf.unregister()
        before = snapshot()
        flash_dmattn_hf.register()
        flash_dmattn_hf.register()
        during = snapshot()
        flash_dmattn_hf.unregister()
        after = snapshot()
        flash_dmattn_hf.unregister()
        changed = sorted(str(key) for key in during if during[key] != before.get(key))
        print(len(before), len(changed), before == after)
        print([key for key in before if before[key] != after.get(key)], [key for key in after if key not in before])
        original = transformers.PreTrainedModel.post_init
        print(original.__module__, original.__qualname__)
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    size, changed, same = lines[0].split()
    assert int(size) > 5000 and int(changed) > 10 and same == "True", lines[1]
    assert lines[2] == "transformers.modeling_utils PreTrainedModel.post_init"


@pytest.fixture
def unregistered():
    unregister()
    yield
    register()


def test_names_are_gone_and_dense_models_work(unregistered):
    for interface in (AttentionInterface, AttentionMaskInterface):
        assert not {"flash_dmattn", "dmattn"} & set(interface._global_mapping)
    model = tiny_model("llama")
    assert model(tokens()).logits.isfinite().all()
    with pytest.raises((ValueError, ImportError)):
        model.set_attn_implementation("flash_dmattn")


def test_patches_are_undone_in_reverse_and_register_is_idempotent():
    originals = [patch.original for patch in registration._PATCHES]
    register()
    assert [patch.original for patch in registration._PATCHES] == originals
    assert len({(patch.owner, patch.attribute) for patch in registration._PATCHES}) == len(originals)
    unregister()
    assert registration._PATCHES == []
    register()
    assert [patch.original for patch in registration._PATCHES] == originals


def test_a_dense_model_has_no_hooks_of_ours():
    model = tiny_model("llama")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.isfinite(model(tokens()).logits).all()


ASK = """
import sys
{before}
import flash_dmattn_hf
{after}
from transformers import LlamaConfig
from transformers.utils.generic import is_flash_attention_requested as late
for name in ("flash_dmattn", "dmattn", "flash_attention_2", "sdpa"):
    config = LlamaConfig()
    config._attn_implementation_internal = name
    print(*(int(ask(config)) + int(ask(requested_attention_implementation=name)) for ask in (late, client.ask)))
flash_dmattn_hf.unregister()
print(int(client.ask.__module__ == "transformers.utils.generic" and not hasattr(client.ask, "__wrapped__")))
"""


@pytest.mark.parametrize("order", [("import client", ""), ("", "import client")], ids=["before", "after"])
def test_libraries_that_ask_for_flash_in_the_name_hear_no(tmp_path, order):
    """Whether they import transformers' function before or after us."""
    (tmp_path / "client.py").write_text(
        "from transformers.utils import generic\n"
        "from transformers.utils.generic import is_flash_attention_requested\n"
        "def __getattr__(name):\n    return is_flash_attention_requested\n"
    )
    program = ASK.format(before=order[0], after=order[1])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:5] == ["0 0", "0 0", "2 2", "0 0", "1"]


@pytest.mark.parametrize("name", ["flash_dmattn", "dmattn"])
def test_a_compile_config_keeps_its_fullgraph(name):
    """transformers takes fullgraph away from FlashAttention."""
    model = make_model("llama-topk")
    model.set_attn_implementation(name)
    config = CompileConfig(fullgraph=True, backend="eager")
    config._compile_all_devices = True
    greedy(model, *make_prompt(), new=3, cache_implementation="static", compile_config=config)
    assert config.fullgraph
