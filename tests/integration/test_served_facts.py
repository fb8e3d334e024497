"""Two real servers, of a BF16 model and of its quantized export: what they multiply with, score and tokenize, and
attaching to one that runs; and a real fallback, made in an engine of this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from eval.client import ServeError, Server, attach, sample, score, tokenize
from eval.config import EvalConfig
from eval.facts import CHATS, NO_TEMPLATE, TEXTS, differences, model_facts
from eval.serve import serve_all
from eval.source import KEY_VARIABLE, ModelSource
from quant.config import QuantConfig
from quant.export import export
from quant.target import Target
from tests.machine import CUTS_OFF, QUANTIZED
from tests.tiny import tiny_folder, tiny_model
from train.config import RolloutConfig
from train.vllm_engine import VllmEngine

pytestmark = pytest.mark.engine
LENGTH = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BF16 model, and its quantized export without the chat template."""
    folder = tmp_path_factory.mktemp("facts")
    model = tiny_model()
    tiny_folder(folder / "bf16")
    target = Target.for_model(QuantConfig(target=QUANTIZED).spec(), model)
    export(model.named_parameters(), target, model_dir=folder / "bf16", out=folder / "quantized", source_step=0)
    (folder / "quantized" / "chat_template.jinja").unlink()
    return folder


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[dict[str, Server]]:
    models = {"baseline": folder / "bf16", "candidate": folder / "quantized"}
    with serve_all(models, EvalConfig(), max_model_len=LENGTH, log_dir=folder) as served:
        yield served


def test_the_engine_says_what_it_multiplies_with(servers: dict[str, Server]) -> None:
    """All eight projections of the export run on its format's kernels and nothing fell back; none of the BF16 model's
    do."""
    kernels = servers["candidate"].kernels
    assert kernels is not None
    assert (kernels.quantized, kernels.fallbacks) == (8, ())
    scheme = {"int4-g128": "CompressedTensorsWNA16/", "fp8-dynamic": "CompressedTensorsW8A8Fp8/"}[QUANTIZED]
    quantized = {name for name, kernel in kernels.by_module.items() if kernel.startswith(scheme)}
    parts = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert quantized == {f"model.layers.{layer}.{part}" for layer in (0, 1) for part in parts}
    plain = servers["baseline"].kernels
    assert plain is not None
    assert (plain.quantized, plain.fallbacks) == (0, ())
    assert plain.by_module.keys() == kernels.by_module.keys()
    assert plain.by_module["lm_head"] == "UnquantizedEmbeddingMethod"
    assert plain.by_module["model.layers.0.self_attn.attn"].endswith("/auto")


def test_a_real_fallback_is_named(folder: Path, tmp_path: Path) -> None:
    """A checkpoint that declares one half of a fused projection quantized and stores both in BF16: vLLM loads it
    without a word and multiplies in BF16, the report names the fused module and no other."""
    from eval.kernel_report import inspect  # imports the engine's worker

    broken = Path(shutil.copytree(folder / "quantized", tmp_path / "broken"))
    tensors, plain = load_file(broken / "model.safetensors"), load_file(folder / "bf16" / "model.safetensors")
    halves = [f"model.layers.1.mlp.{half}_proj" for half in ("gate", "up")]
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(halves))}
    stored = {f"{half}.weight": plain[f"{half}.weight"] for half in halves}
    save_file(kept | stored, broken / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((broken / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_0"]["targets"] = ["re:.*self_attn.*", r"re:.*(gate|down)_proj$", r"re:.*layers\.0\.mlp\.up_proj$"]
    (broken / "config.json").write_text(json.dumps(config))
    rollout = RolloutConfig(prompts=1, group_size=2, max_tokens=8, max_model_len=LENGTH, kv_cache_gib=0.02)
    engine = VllmEngine(broken, rollout, seed=0)
    ((modules, fallen),) = engine._llm.apply_model(lambda model: inspect(model, broken))
    assert fallen == ["model.layers.1.mlp.gate_up_proj"]
    assert sum(module.quantized for module in modules) == 7


def test_a_lone_worker_runs_inside_its_engine(servers: dict[str, Server]) -> None:
    """A server is two processes, vLLM's front and its engine: no third one imports vLLM, and none is asked by message
    for every token."""
    for server in servers.values():
        names = [child.name() for child in psutil.Process(server.pid).children(recursive=True)]
        assert [name for name in names if name.startswith("VLLM::")] == ["VLLM::EngineCore"], names


def test_scores_are_the_log_probs_of_sampling(servers: dict[str, Server]) -> None:
    """Every sampled token is given its log-prob again, by the prefill of the whole sequence, within 1e-5 nats, by both
    servers; the other server gives the same tokens others. A sequence without room for one more token is refused.

    Where oneDNN has AVX-512 without BF16 instructions, its BF16 products of fewer than eight rows, those of decoding a
    few sequences, are not those of more: 2e-3 nats were seen."""
    close = 5e-3 if CUTS_OFF else 1e-5
    prompts = [[5 + i, 6, 7 + i % 3] for i in range(16)]
    for label, other in (("baseline", "candidate"), ("candidate", "baseline")):
        done = sample(servers[label], prompts, max_tokens=40, temperature=1.0, seed=1, concurrency=8)
        sequences = [[*one.prompt_ids, *one.token_ids] for one in done]
        first = [len(one.prompt_ids) for one in done]
        sampled = [value for one in done for value in one.logprobs]
        scored = [value for row in score(servers[label], sequences, first, concurrency=8) for value in row]
        assert len(sampled) > 300
        assert max(abs(a - b) for a, b in zip(sampled, scored, strict=True)) < close
        elsewhere = [value for row in score(servers[other], sequences, first, concurrency=8) for value in row]
        assert max(abs(a - b) for a, b in zip(sampled, elsewhere, strict=True)) > max(close, 1e-3)
    assert len(score(servers["baseline"], [[5] * (LENGTH - 1)], [1], concurrency=1)[0]) == LENGTH - 2
    with pytest.raises(ServeError, match="sequence 0: HTTP 400"):
        score(servers["baseline"], [[5] * LENGTH], [1], concurrency=1)


def test_the_server_tokenizes_as_the_tokenizer_does(servers: dict[str, Server], folder: Path) -> None:
    """Every probe, also those longer than the served context, as text and through the chat template."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "bf16")
    for text in TEXTS.values():
        assert tokenize(servers["baseline"], text) == tuple(tokenizer(text).input_ids)
    for messages in CHATS.values():
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert tokenize(servers["baseline"], messages) == tuple(rendered)
    assert max(map(len, TEXTS.values())) > LENGTH


def test_a_lost_template_is_found_in_what_is_served(servers: dict[str, Server], folder: Path) -> None:
    """Two models that are alike but for the template that the export lost: that alone is told, and the manifest of the
    export misses the file."""
    facts = {
        label: model_facts(label, ModelSource.parse(str(folder / name)), servers[label], folder / name)
        for label, name in (("baseline", "bf16"), ("candidate", "quantized"))
    }
    assert facts["baseline"].missing == {}
    assert facts["candidate"].missing == {"chat_ids": NO_TEMPLATE}
    assert differences(facts["baseline"], facts["candidate"]) == [
        "the candidate has no chat template, the baseline has one"
    ]
    assert facts["baseline"].text_ids == facts["candidate"].text_ids
    found = facts["candidate"].weights
    assert found is not None
    assert found.problems == ("chat_template.jinja: missing, the manifest lists it",)
    assert facts["candidate"].command[:5][-1] == str(folder / "quantized")
    assert facts["candidate"].startup_seconds == servers["candidate"].startup_seconds > 0


def test_attaching_to_a_running_server(servers: dict[str, Server], monkeypatch: pytest.MonkeyPatch) -> None:
    """By its URL and the key in the environment: the same completions and token ids; what only its starter can know is
    missing. The key is part of no fact."""
    server = servers["candidate"]
    source = ModelSource.parse(f"{server.base_url}#{server.model}")
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(ServeError, match="HTTP 401"):
        attach(source)
    monkeypatch.setenv(KEY_VARIABLE, server.api_key)
    attached = attach(source)
    assert (attached.model, attached.max_model_len, attached.pid) == ("quantized", LENGTH, None)
    settings: dict[str, Any] = {"max_tokens": 8, "temperature": 1.0, "seed": 0, "concurrency": 2}
    assert sample(attached, [[5, 6]], **settings) == sample(server, [[5, 6]], **settings)
    facts = model_facts("candidate", source, attached, None)
    assert facts.text_ids == {name: tokenize(server, text) for name, text in TEXTS.items()}
    assert facts.context == LENGTH
    assert set(facts.missing) == {"weights", "config", "end_tokens", "kernels", "startup_seconds", "chat_ids"}
    assert server.api_key not in repr(facts) + repr(attached)


def test_the_report_opened_nothing(servers: dict[str, Server]) -> None:
    """No development endpoint answers: what the report says was not asked of the server."""
    server = servers["baseline"]
    url = f"{server.base_url.removesuffix('/v1')}/collective_rpc"
    asked = httpx.post(url, json={"method": "get_model"}, headers=server.headers, trust_env=False)
    assert asked.status_code == 404
