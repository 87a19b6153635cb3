"""Programs that decode, compiled for machines you do not have, and what is read from a compiled module."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from helpers import tiny

from configs.paper import gemma_7b
from pasta_jax.config import Config, with_changes
from pasta_jax.decode import ahead
from pasta_jax.decode.interpreter import Interpreter
from pasta_jax.decode.sampling import as_arrays
from pasta_jax.decode.settings import Limits, SamplingConfig, StepFeatures
from pasta_jax.lang.forms import Forms
from pasta_jax.utils.hlo import Module
from pasta_jax.utils.topology import GPUS, topology

ROOT = Path(__file__).parents[2]
MOST_HERE = 370  # kernels of a step of `tiny` on a CPU
GEMMA = str(Path(gemma_7b.__file__).with_suffix(".json"))


def compiled(function, *shapes: tuple[int, ...], **options) -> jax.stages.Compiled:
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.jit(function, **options).lower(*arguments).compile()


@pytest.mark.parametrize(
  "function, shapes",
  [
    (lambda x, y: x @ y, [(64, 128), (128, 256)]),
    (lambda x, y: jnp.tanh(x @ y).sum(), [(64, 128), (128, 256)]),
    (lambda x: jax.lax.dynamic_slice(x, (3, 0), (2, 512)) * 2, [(4096, 512)]),
    (lambda x, y: jax.lax.dynamic_update_slice(x, y * 2, (3, 0)), [(4096, 512), (2, 512)]),
  ],
)
def test_bytes_are_those_of_xla(function, shapes):
  """Its own analysis counts a call's operands as well as those of the instructions in it."""
  program = compiled(function, *shapes, donate_argnums=0)
  module, cost = Module.parse(program.as_text()), program.cost_analysis()
  assert module.bytes(module.entry) == pytest.approx(cost["bytes accessed"], rel=0.5)
  least = sum(4 * a * b for a, b in shapes[1:]) + (
    4 * shapes[0][0] * shapes[0][1] if len(shapes[0]) == 2 else 0
  )
  if shapes[0] == (4096, 512):
    assert module.bytes(module.entry) < least / 50  # a slice is not the whole


def test_a_loop_is_counted_as_often_as_it_turns():
  def several(x, n):
    return jax.lax.fori_loop(0, n, lambda _, y: jnp.tanh(y @ y), x)

  once, eight = (Module.parse(compiled(lambda x, n=n: several(x, n), (32, 32)).as_text()) for n in (2, 16))
  assert [loop.trips for loop in once.loops()] == [2] and [loop.trips for loop in eight.loops()] == [16]
  count = lambda module: sum(module.kernels(module.entry).values())
  body = lambda module: sum(module.kernels(module.body(module.loops()[0])).values())
  assert body(once) == body(eight) >= 1
  assert count(eight) - count(once) == pytest.approx(14 * body(once), abs=14)


def test_collectives_and_memory_spaces():
  module = Module.parse(
    """
ENTRY %main (p.1: bf16[8,256]) -> f32[8,256] {
  %p.1 = bf16[8,256]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = f32[8,256]{1,0:T(8,128)S(1)} all-reduce(%p.1), channel_id=1, to_apply=%add
  %copy-start.2 = (bf16[8,256]{1,0:T(8,128)(2,1)S(1)}, bf16[8,256]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%p.1)
  %copy-done.2 = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start.2)
  ROOT %fusion.3 = f32[8,256]{1,0:T(8,128)} fusion(%copy-done.2, %all-reduce.1), kind=kLoop, calls=%inside
}

%inside (a: bf16[8,256], b: f32[8,256]) -> f32[8,256] {
  %a = bf16[8,256]{1,0} parameter(0)
  %b = f32[8,256]{1,0} parameter(1)
  ROOT %add = f32[8,256]{1,0} add(%b, %b)
}
"""
  )
  assert module.collectives("main") == {"all-reduce": (1, 8192)}
  assert dict(module.kernels("main")) == {"all-reduce": 1, "fusion": 1}
  # The collective and the copy read the parameter; the fusion writes its result, and reads from faster memory.
  assert module.bytes("main") == 4096 + 4096 + 8192


def test_an_architecture_is_enough():
  model, vocabulary = ahead.architecture(GEMMA)
  assert (model.d_model, model.vocab_size, model.n_layers) == (3072, 256_000, 28) and len(model.tag_ids) == 6
  assert vocabulary.size == 256_000 and vocabulary.tags.ids == model.tag_ids
  model, vocabulary = ahead.architecture(GEMMA, Forms(promise="head", number="token"))
  assert len(model.tag_ids) == 70 and tuple(vocabulary.table.lengths) == model.tag_ids[6:]
  assert ahead.architecture("tiny")[0].n_layers > 0


def test_what_cannot_be_compiled():
  with pytest.raises(
    ValueError, match="compile.stages takes train, preference, prefill, decode, not 'sample'"
  ):
    with_changes(Config(), {"compile.stages": "train,sample"})
  with pytest.raises(ValueError, match="compile.branches takes different numbers from 1 to 256"):
    with_changes(Config(), {"compile.branches": "8,8"})
  with pytest.raises(
    ValueError, match="compile.topology='nowhere' is not available .* libtpu is needed; or h100"
  ):
    topology("nowhere")
  if find_spec("jax_plugins") is None:
    with pytest.raises(ValueError, match="the compiler for NVIDIA H100 80GB HBM3 is not available"):
      topology("h100")
  assert 'name: "CUDA"' in GPUS["h100"].proto()


def run(*flags: str) -> str:
  command = [sys.executable, "main.py", "--mode=compile", "--config=configs/tiny.py", *flags]
  wide = os.environ | {"COLUMNS": "140"}
  done = subprocess.run(command, cwd=ROOT, env=wide, capture_output=True, text=True)
  return done.stdout + done.stderr


def test_a_step_has_few_kernels_here():
  """On any machine: the control of the threads is a few kernels, whatever the layers have."""
  it = Interpreter(
    tiny.model(), tiny.VOCABULARY, Limits(branch_widths=(8,)), StepFeatures(visibility="live", no_repeat=16)
  )
  state, numbers = it.prefill([3, 5, 2]), as_arrays(SamplingConfig())
  shape = dict(width=8, features=it.features, look=2)
  module = Module.parse(
    it.trace("segment", it.params, state, numbers, 8, **shape).lower().compile().as_text()
  )
  body = next(module.body(loop) for loop in module.loops(module.body(module.loops()[0])) if loop.trips == 2)
  kernels = sum(module.kernels(body).values())
  print(f"{kernels} kernels in a step of {tiny.CONFIG.n_layers} layers")
  assert kernels <= MOST_HERE


@pytest.mark.skipif(find_spec("libtpu") is None, reason="the TPU compiler is not installed")
def test_the_tpu_compiler_takes_prefill_and_steps():
  shown = run(
    "--config.compile.topology=v5e:2x4", "--config.compile.stages=prefill,decode", "--config.mesh.fsdp=1",
    "--config.mesh.tensor=2", "--config.mesh.data=4", "--config.compile.requests=1,8",
    "--config.language.visibility=live",
  )  # fmt: skip
  for text in (
    "8 x TPU v5 lite",
    "prefill of 512",
    "8 branches",
    "8 branches x 8",
    "a chip has 14.90 GiB",
  ):
    assert text in " ".join(shown.split()), shown
  refused = run("--config.compile.topology=v5e:2x2", "--config.compile.stages=decode", "--config.mesh.data=4",
                "--config.mesh.fsdp=1", "--config.compile.requests=6")  # fmt: skip
  assert "error: compile.requests=6 cannot be divided over mesh.data=4" in refused


@pytest.mark.skipif(find_spec("jax_plugins") is None, reason="the GPU compiler is not installed")
def test_the_gpu_compiler_takes_steps():
  """And a step has few kernels: eleven a layer, two writes to its pool, and what the threads need."""
  layers = ahead.architecture("tiny")[0].n_layers
  for attention, most in (("xla", 16), ("gpu", 13)):
    shown = run("--config.compile.topology=h100", "--config.compile.stages=decode",
                f"--config.decode.attention={attention}", "--config.language.visibility=live")  # fmt: skip
    assert "1 x NVIDIA H100" in shown, shown
    [row] = [line.split() for line in shown.splitlines() if "8 branches" in line]
    kernels = int(row[-3].replace(",", ""))
    print(f"{attention}: {kernels} kernels in a step of {layers} layers")
    assert kernels <= most * layers + 50
