"""A model of a billion parameters on this machine: compress, export, start, sync, verify; seconds and peak memory.

`make large` prints it (`--target int8` for another target). Weights are random. Throughput is given over a memcpy of
the same BF16 bytes in the same run, memory as what a phase adds at its peak to what was resident before it.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 18, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000, "max_position_embeddings": 1024,
}  # fmt: skip
STEP_TOKENS = 64 * 8 * 512  # a usual RL step: 64 prompts x 8 completions x 512 tokens


@dataclass
class Phase:
    """Seconds, and bytes that were resident at the peak beyond those before."""

    seconds: float = 0.0
    peak: int = 0


def main() -> None:
    """Run every phase and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="int4-g128")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    options = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    from quant.config import TargetSpec
    from quant.export import export
    from quant.target import Target
    from train.config import RolloutConfig
    from train.sync import Synced, sync
    from train.timing import Stopwatch
    from train.vllm_engine import VllmEngine
    from train.warmstart import character_tokenizer

    shape = Qwen3Config(
        **SHAPE | {"num_hidden_layers": options.layers},
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["Qwen3ForCausalLM"],
    )
    with torch.device("meta"):
        blank = AutoModelForCausalLM.from_config(shape)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.empty(p.shape, dtype=torch.bfloat16).normal_(1.0 if p.ndim == 1 else 0.0, 0.02, generator=generator)
        for name, p in blank.named_parameters()
    }
    target = Target.for_model(TargetSpec.load(options.target), blank)
    size = sum(weight.nbytes for weight in weights.values())
    block = sum(weight.nbytes for name, weight in weights.items() if name.startswith("model.layers.0."))
    print(f"{size / 2e9:.2f} B parameters, {size / 2**30:.2f} GiB in BF16, {block / 2**20:.0f} MiB a decoder layer")

    with phase() as copy:
        for weight in weights.values():
            weight.clone()
    with phase() as compress:
        for _ in target.compress(weights.items()):
            pass
    print(f"memcpy    {copy.seconds:7.2f} s")
    print(
        f"compress  {compress.seconds:7.2f} s   {copy.seconds / compress.seconds:.3f} of memcpy's throughput, "
        f"peak extra {compress.peak / 2**20:.0f} MiB = {compress.peak / block:.2f} decoder layers"
    )
    with tempfile.TemporaryDirectory() as folder:
        model_dir, out = Path(folder) / "model", Path(folder) / "export"
        shape.save_pretrained(model_dir)
        character_tokenizer(["0123456789"]).save_pretrained(model_dir)
        with phase() as written:
            export(weights.items(), target, model_dir=model_dir, out=out, source_step=0)
        held = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        print(f"export    {written.seconds:7.2f} s   {held / size:.3f} of BF16 on disk, peak extra {mib(written)}")
        rollout = RolloutConfig(prompts=2, group_size=2, max_tokens=8, max_model_len=64)
        with phase() as start:
            engine = VllmEngine(out, rollout, seed=0)
        print(f"engine    {start.seconds:7.2f} s   peak extra {mib(start)}")
    previous: Synced | None = None
    clock = Stopwatch()
    for what in ("all layers", "one layer moved"):
        if previous is not None:
            weights |= {name: weight * 1.0625 for name, weight in weights.items() if ".layers.3." in name}
        clock = Stopwatch()
        with phase() as synced:
            previous = sync(weights, target, engine, step=0, previous=previous, clock=clock)
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in clock.seconds.items())
        print(
            f"sync      {synced.seconds:7.2f} s   {what}: {parts}; {previous.sent:.3f} of the bytes sent, "
            f"{synced.seconds / size * 1e9:.2f} s/GB of BF16, peak extra {mib(synced)}"
        )
    tokens_per_second = training_speed(shape, weights)
    share = clock.seconds["verify"] * tokens_per_second / STEP_TOKENS
    print(
        f"verify is {share:.4f} of a step of {STEP_TOKENS:,} tokens at {tokens_per_second:.0f} tokens/s of "
        f"forward-backward alone"
    )


def training_speed(shape: Any, weights: dict[str, Any]) -> float:
    """Tokens per second of forward and backward in BF16, 2 x 256 tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    model.load_state_dict(weights, assign=True, strict=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(shape)  # its buffer was made on meta
    ids = torch.randint(0, shape.vocab_size, (2, 256))
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        model(input_ids=ids, use_cache=False, labels=ids).loss.backward()
        seconds.append(time.perf_counter() - start)
        model.zero_grad()
    return ids.numel() / min(seconds)


@contextmanager
def phase() -> Iterator[Phase]:
    """Time what runs inside and sample the process's resident memory every millisecond."""
    import psutil

    ctypes.CDLL("libc.so.6").malloc_trim(0)
    process, found, done = psutil.Process(), Phase(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.001):
            found.peak = max(found.peak, process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        yield found
    finally:
        found.seconds = time.perf_counter() - start
        done.set()
        watcher.join()


def mib(of: Phase) -> str:
    return f"{of.peak / 2**20:.0f} MiB"


if __name__ == "__main__":
    main()
