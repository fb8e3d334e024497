"""LoRA on the real engine: only adapted layers are sent, the export is the last sync, peft reads the adapter."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config import load_config
from pipeline.run import export, open_run, prepare, train
from pipeline.run_dir import read_json, read_jsonl
from quant.export import read_tensors
from tests.machine import INT4

pytestmark = pytest.mark.engine
LORA = Path(__file__).parent.parent.parent / "configs" / "methods" / "lora.toml"


def test_adapters_train_sync_and_export(tmp_path) -> None:
    """q_proj alone is adapted. Every sync is verified by the run itself; after the first, exactly the bytes of q, k and
    v (one matrix in vLLM) are sent. The export passes its comparison with the last sync. The adapter, merged by peft
    into the base in FP32 and rounded, is the policy that shipped, bit for bit, and that is not the base."""
    overrides = (
        f"quant.target={INT4}",
        "train.task.grader=tests.rewards:share_of_digits",
        "eval.grader=exact",
        "train.rollout.kv_cache_gib=0.05",
        "train.lora.modules=['q_proj']",
    )
    config = load_config(LORA, overrides)
    run = open_run(tmp_path / config.name, config)
    for stage in (prepare, train, export):
        stage(run, config)

    sizes = {name: tensor.nbytes for name, tensor in read_tensors(run.export)}
    attention = sum(size for name, size in sizes.items() if any(f"{p}_proj" in name for p in "qkv"))
    share = attention / sum(sizes.values())
    sent = [row["sync_sent"] for row in read_jsonl(run.metrics)]
    assert sent == [1.0, pytest.approx(share), pytest.approx(share)]
    assert share < 0.22
    manifest = read_json(run.export / "manifest.json")
    assert manifest["tensors"] == read_json(run.last_sync)["tensors"]
    assert manifest["source_step"] == 3

    base = AutoModelForCausalLM.from_pretrained(run.made_model, dtype=torch.float32)
    started = {name: p.detach().to(torch.bfloat16) for name, p in base.named_parameters()}
    merged = peft.PeftModel.from_pretrained(base, str(run.adapter)).merge_and_unload()
    shipped = dict(read_tensors(run.policy))
    rounded = {name: p.detach().to(torch.bfloat16) for name, p in merged.named_parameters()}
    assert rounded.keys() == shipped.keys()
    assert all(torch.equal(rounded[name], tensor) for name, tensor in shipped.items())
    changed = {name.split(".")[-2] for name, tensor in shipped.items() if not torch.equal(started[name], tensor)}
    assert changed == {"q_proj"}
