"""The model of a prepared folder: built from its config alone, whatever code that asks for."""

from __future__ import annotations

import pytest
import torch
from tiny_models import CONFIGS
from transformers import AutoConfig, PretrainedConfig
from transformers.integrations import hub_kernels

from moe_offload.errors import UserError
from moe_offload.model.attention import takes_other_attention
from moe_offload.model.loader import build_skeleton


def asking_for_code(name: str) -> PretrainedConfig:
    fields = CONFIGS[name]().to_dict()
    fields["attn_implementation"] = "someone/attention"
    fields["auto_map"] = {"AutoModelForCausalLM": "evil.EvilForCausalLM"}
    return AutoConfig.for_model(**fields)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_a_config_names_no_code_to_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a kernel of the hub nor a class beside the weights."""
    loaders = [one for one in dir(hub_kernels) if one.startswith(("load_", "get_kernel"))]
    assert loaders
    for loader in loaders:
        monkeypatch.setattr(hub_kernels, loader, lambda *_, **__: pytest.fail("loads a kernel"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    model = build_skeleton(asking_for_code(name), torch.bfloat16, "sdpa")
    assert model.config._attn_implementation == ("eager" if name == "gpt_oss" else "sdpa")
    assert all(parameter.is_meta for parameter in model.parameters())


def test_attention_is_replaced_where_the_model_says_that_it_may_be() -> None:
    """Any function that knows all of its terms, which xformers does not of gpt-oss's sinks."""
    for name in ("mixtral", "gpt_oss"):
        model = build_skeleton(CONFIGS[name](), torch.bfloat16, "sdpa")
        assert takes_other_attention(type(model))
    with pytest.raises(UserError, match="use --attention sdpa"):
        build_skeleton(CONFIGS["gpt_oss"](), torch.bfloat16, "xformers")
