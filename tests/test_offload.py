"""Offloaded blocks, held to: results of the same blocks to the bit, one copy of every weight, a slot is never
overwritten while it is read nor read before it is filled, copies run ahead. On the CPU against a lane that
spoils every slot that may not be read (property); on a GPU the real lane (gpu)."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import tiny_model
import torch
from dit_parts import SMALL, Inputs, random_dit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flashtalk_cli import launch
from flashtalk_cli.config import BenchJob, Preset, Speech
from flashtalk_cli.errors import DeviceError
from flashtalk_cli.events import Emitter
from flashtalk_cli.models import weights
from flashtalk_cli.models.dit import PARTS, DiT, DitParams
from flashtalk_cli.models.folder import find
from flashtalk_cli.models.offload import CudaLane, Offload
from flashtalk_cli.parallel.ranks import Ranks
from flashtalk_cli.parallel.sequence import Sequence
from flashtalk_cli.rendering import Worker

NONSENSE = 0xFF  # as a float of any format, NaN
GPU_PARAMS = DitParams(dim=512, ffn_dim=1024, num_heads=8, num_layers=7, text_dim=64, text_len=16)


class LateLane:
    """A lane whose copies happen at the last moment, and whose slots hold nonsense when nobody may read them."""

    def __init__(self) -> None:
        self.waiting: dict[int, Tensor] = {}
        self.log: list[tuple[str, int]] = []
        self.moved = 0

    def pin(self, host: Tensor) -> None:
        pass

    def allocate(self, slots: int, n_bytes: int) -> None:
        self.slots = [torch.full((n_bytes,), NONSENSE, dtype=torch.uint8) for _ in range(slots)]
        self.read: set[int] = set()

    def fetch(self, slot: int, host: Tensor) -> None:
        assert slot not in self.read, "overwritten while it is read"
        assert slot not in self.waiting, "overwritten before it was read"
        self.waiting[slot] = host
        self.log.append(("fetch", slot))
        self.moved += len(host)

    def arrive(self, slot: int) -> Tensor:
        host = self.waiting.pop(slot)
        self.slots[slot][: len(host)] = host
        self.read.add(slot)
        self.log.append(("arrive", slot))
        return self.slots[slot]

    def leave(self, slot: int) -> None:
        self.read.remove(slot)
        self.slots[slot].fill_(NONSENSE)


@torch.no_grad()
def test_the_model_computes_the_same_to_the_bit() -> None:
    """Parity: velocity, and keys and values, twice in a row."""
    dit, inputs = random_dit(), Inputs.draw(SMALL)
    expected = inputs.through(dit)
    dit.offload = Offload(dit.blocks, PARTS, LateLane())
    for _ in range(2):
        assert torch.equal(inputs.through(dit), expected)


@torch.no_grad()
def test_a_part_reads_its_own_weights_only() -> None:
    """Contract: what a step or its preparation computes is the same with every other weight of the blocks destroyed."""
    dit, inputs = random_dit(), Inputs.draw(SMALL)
    context, audio = dit.condition(inputs.text, inputs.image), dit.hear(inputs.windows)

    def only(part: str) -> DiT:
        alone = deepcopy(dit)
        for block in alone.blocks:
            for name, weight in block.named_parameters():
                if part != next((p for p, names in PARTS.items() if name.startswith(names)), "forward"):
                    weight.fill_(torch.nan)
        return alone

    again = only("condition").condition(inputs.text, inputs.image), only("hear").hear(inputs.windows)
    for found, expected in zip(again, (context, audio), strict=True):
        pairs = zip(tree_leaves(found.blocks), tree_leaves(expected.blocks), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))
    step = inputs.x, inputs.t, inputs.y, context, audio, Sequence()
    assert torch.equal(only("forward")(*step), dit(*step))


@torch.no_grad()
def test_a_part_moves_its_own_weights_only() -> None:
    """Contract: forward does not pay for weights that only prepare keys; together they are the whole block."""
    dit, inputs = random_dit(), Inputs.draw(SMALL)
    lane = LateLane()
    dit.offload = Offload(dit.blocks, PARTS, lane)
    moved = {}
    for part in ("condition", "hear", "forward"):
        before = lane.moved
        for _ in dit.offload.each(part):
            pass
        moved[part] = lane.moved - before
    n = 4 * SMALL.dim**2 * SMALL.num_layers
    assert moved["condition"] >= 4 * n
    assert moved["hear"] >= 4 * 2 * SMALL.dim * SMALL.output_dim * SMALL.num_layers
    total = sum(p.nbytes for p in dit.blocks.parameters())
    assert total <= sum(moved.values()) < total + 256 * len(list(dit.blocks.parameters()))
    assert moved["forward"] < 0.75 * total
    assert inputs.through(dit).isfinite().all()


@settings(max_examples=40)
@given(n_blocks=st.integers(1, 9), ahead=st.integers(1, 4), stop=st.integers(0, 9))
def test_copies_run_ahead_and_never_collide(n_blocks: int, ahead: int, stop: int) -> None:
    """Property: each block sees its own weights in its turn; `ahead` copies are under way by then.

    Also after a pass that was left in the middle, or ended by an error.
    """
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(n_blocks))
    expected = [block.weight.detach().clone() for block in blocks]
    lane = LateLane()
    offload = Offload(blocks, {}, lane, ahead)
    passes = offload.each("forward")
    for seen, block in enumerate(passes):
        assert torch.equal(block.weight, expected[seen])
        others = [b.weight for b in blocks if b is not block]
        assert all(
            w.untyped_storage().data_ptr() != block.weight.untyped_storage().data_ptr() for w in others
        )
        fetched = sum(kind == "fetch" for kind, _ in lane.log)
        assert fetched == min(n_blocks, seen + 1 + ahead)
        if seen == stop:
            break
    passes.close()
    lane.waiting.clear()  # a real slot may be fetched into again; here that would be taken for a fault
    lane.read.clear()
    for seen, block in enumerate(offload.each("forward")):
        assert torch.equal(block.weight, expected[seen])
    assert all(torch.equal(block.weight, weight) for block, weight in zip(blocks, expected, strict=True))


def test_weights_may_have_several_number_formats() -> None:
    """Contract: also buffers, such as the scales of weights in eight bits."""
    block = nn.Linear(5, 3).to(torch.bfloat16)
    block.register_buffer("scale", torch.arange(3, dtype=torch.float32))
    block.register_buffer("eight", torch.ones(7).to(torch.float8_e4m3fn))
    expected = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    passes = Offload([block], {"scale": ("scale",)}, LateLane()).each("forward")
    seen = next(passes)
    homes = {name: tensor.untyped_storage().data_ptr() for name, tensor in seen.state_dict().items()}
    assert homes["eight"] == homes["weight"] != homes["scale"], "moved with the weights; of another part"
    for name, tensor in seen.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor.float(), expected[name].float())


def test_there_is_one_copy_of_every_weight() -> None:
    """Contract: what the module holds are views of what was packed, and nothing else keeps the old tensors."""
    dit = random_dit()
    before = sum(p.untyped_storage().nbytes() for p in dit.blocks.parameters())
    dit.offload = Offload(dit.blocks, PARTS, LateLane())
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in dit.blocks.parameters()}
    assert len(storages) == 3 * SMALL.num_layers
    assert sum(storages.values()) < before + 256 * len(list(dit.blocks.parameters()))


MEASURE = """
import resource
import torch
from types import SimpleNamespace
from flashtalk_cli.models.dit import PARTS, DiT, DitParams
from flashtalk_cli.models.offload import Offload
from flashtalk_cli.models.weights import fill_random

def held_bytes():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

with torch.device("meta"):
    blocks = DiT(DitParams(dim=640, ffn_dim=1728, num_heads=10, num_layers=16)).blocks
fill_random(blocks, "cpu", torch.bfloat16, 0)
before, model = held_bytes(), sum(p.nbytes for p in blocks.parameters())
offload = Offload(blocks, PARTS, SimpleNamespace(pin=lambda host: None, allocate=lambda slots, n_bytes: None))
print((held_bytes() - before) / model)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_freed_weights_go_back_to_the_system() -> None:
    """Fault: with what launch.py asks of glibc, weights that were moved would stay; here in small: an eighth wide."""
    names = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
    environment = {**os.environ, **{name: str(int(launch.ENVIRONMENT[name]) // 64) for name in names}}
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.1


def test_blocks_are_read_into_host_memory_from_files_and_at_random(tmp_path: Path) -> None:
    """Contract: only parameters named so stay on the host. The device here is `meta`, which holds nothing."""
    tiny_model.write(tmp_path)
    folder = find(tmp_path)
    plan = weights.plan_of(folder, "dit")
    assert plan.source is not None
    weights.fill(plan.module, plan.layout, plan.source, "cpu", torch.float32, on_host="blocks.")
    homes = {name: weights.home_of(name, "cuda", "blocks.") for name, _ in plan.module.named_parameters()}
    assert {name for name, home in homes.items() if home == "cpu"} == {
        name for name in homes if name.startswith("blocks.")
    }
    assert weights.home_of("blocks.0", "cuda", None) == "cuda"


def test_on_a_cpu_it_is_an_error_with_the_mend(tmp_path: Path) -> None:
    """Fault: never ignored in silence."""
    preset = Preset.model_validate({"name": "x", "description": "", "compute": {"offload": True}})
    speech = Speech(samples_path=tmp_path, n_samples=1, loudness_lufs=None)
    job = BenchJob(preset=preset, picture=tmp_path, speech=speech)
    with pytest.raises(DeviceError, match="this run uses the CPU: leave it out"):
        Worker(job, Ranks(torch.device("cpu")), Emitter(None))


def test_offload_loads_no_cuda() -> None:
    """Contract: a machine without CUDA may import it."""
    code = "import flashtalk_cli.models.offload, torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True)


# On a GPU


def on_gpu(dtype: torch.dtype) -> tuple[DiT, Inputs]:
    """A model of some MB with its parts outside the blocks on the GPU, and what it is given."""
    dit = random_dit(GPU_PARAMS).to(dtype)
    drawn = Inputs.draw(GPU_PARAMS, h=16, w=16)
    given_ = Inputs(*(getattr(drawn, name).to("cuda") for name in Inputs.__dataclass_fields__))
    return dit, given_


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_gpu_computes_the_same_to_the_bit(dtype: torch.dtype) -> None:
    """Parity, many passes in a row without waiting between them, and with less memory."""
    dit, inputs = on_gpu(dtype)
    blocks, dit.blocks = dit.blocks, nn.ModuleList()
    dit.cuda()
    dit.blocks = blocks
    held = torch.cuda.memory_allocated()
    block_bytes = sum(p.nbytes for p in blocks.parameters()) / len(blocks)
    dit.offload = Offload(dit.blocks, PARTS, CudaLane(torch.device("cuda")))
    assert torch.cuda.memory_allocated() - held < 3.2 * block_bytes
    results = [inputs.through(dit) for _ in range(10)]
    dit.offload = None
    dit.cuda()
    expected = inputs.through(dit)
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_pinned_memory_is_let_go() -> None:
    """Fault: memory that is freed while CUDA holds it pinned could never be pinned again."""
    for _ in range(3):
        dit, _ = on_gpu(torch.bfloat16)
        dit.offload = Offload(dit.blocks, PARTS, CudaLane(torch.device("cuda")))
        assert all(p.is_pinned() for p in dit.blocks.parameters())
        del dit
        gc.collect()
