"""Weights: streamed onto any mesh and back, bit for bit, or refused by name."""

import json
import os
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as library

from dpop_jax import sharding
from dpop_jax.hf import safetensors_files, weights
from dpop_jax.hf.names import Part

P = jax.sharding.PartitionSpec
BFLOAT16 = jnp.dtype("bfloat16")
MESHES = [(1, 1, 1), (2, 2, 2), (1, 8, 1), (1, 1, 8)]
LAYERS, EXPERTS = 3, 2
D, H, K, F, V = 16, 8, 4, 24, 40


def parts_of_layer(layer):
  name, at, index = f"layers.{layer}", "layers", (layer,)
  heads = ((1, 2), (0,))
  yield Part(f"{name}.norm", (at, "norm"), index, (D,), ((0,),))
  yield Part(f"{name}.bias", (at, "bias"), index, (H, K), ((0, 1),))
  yield Part(f"{name}.out", (at, "out"), index, (H, K, D), ((2,), (0, 1)))
  # One tensor holds these three, one below the other.
  for number, path in enumerate(("query", "key", "value")):
    offset = number * H * K
    yield Part(f"{name}.qkv", (at, path), index, (D, H, K), heads, offset)
  for expert in range(EXPERTS):
    yield Part(
      f"{name}.experts.{expert}.up",
      (at, "up"),
      (layer, expert),
      (D, F),
      ((1,), (0,)),
    )


PARTS = [
  Part("embed", ("embedding",), (), (V, D), ((0,), (1,))),
  *(part for layer in range(LAYERS) for part in parts_of_layer(layer)),
]
HEADS = ((LAYERS, D, H, K), P(None, "fsdp", "tensor"))
ARRAYS = {
  "embedding": ((V, D), P("tensor", "fsdp")),
  "layers": {
    "norm": ((LAYERS, D), P()),
    "bias": ((LAYERS, H, K), P(None, "tensor")),
    "out": ((LAYERS, H, K, D), P(None, "tensor", None, "fsdp")),
    "query": HEADS,
    "key": HEADS,
    "value": HEADS,
    "up": ((LAYERS, EXPERTS, D, F), P(None, None, "fsdp", "tensor")),
  },
}
SHAPES = {"embed": (V, D)}
for _layer in range(LAYERS):
  SHAPES |= {
    f"layers.{_layer}.norm": (D,),
    f"layers.{_layer}.bias": (H * K,),
    f"layers.{_layer}.out": (D, H * K),
    f"layers.{_layer}.qkv": (3 * H * K, D),
    f"layers.{_layer}.experts.0.up": (F, D),
    f"layers.{_layer}.experts.1.up": (F, D),
  }


def abstract_params(sizes=(1, 1, 1), dtype=jnp.float32, stride=1):
  """With a stride of 2 every second device comes first in the mesh."""
  data, fsdp, tensor = sizes
  devices = [d for i in range(stride) for d in jax.devices()[i::stride]]
  mesh = sharding.make_mesh(
    sharding.MeshConfig(data=data, fsdp=fsdp, tensor=tensor),
    devices[: data * fsdp * tensor],
  )
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf[0], dtype, sharding=jax.NamedSharding(mesh, leaf[1])
    ),
    ARRAYS,
    is_leaf=lambda leaf: isinstance(leaf, tuple),
  )


def make_tensors(dtype=np.float32):
  rng = np.random.default_rng(0)
  return {
    name: rng.normal(size=shape).astype(np.float32).astype(dtype)
    for name, shape in SHAPES.items()
  }


def expected_params(tensors):
  """The plain way: everything is read, then transposed."""
  over_layers = lambda make: np.stack([make(i) for i in range(LAYERS)])

  def of_qkv(number):
    rows = slice(number * H * K, (number + 1) * H * K)
    return over_layers(
      lambda i: tensors[f"layers.{i}.qkv"][rows].T.reshape(D, H, K)
    )

  return {
    "embedding": tensors["embed"],
    "layers": {
      "norm": over_layers(lambda i: tensors[f"layers.{i}.norm"]),
      "bias": over_layers(lambda i: tensors[f"layers.{i}.bias"].reshape(H, K)),
      "out": over_layers(lambda i: tensors[f"layers.{i}.out"].T).reshape(
        LAYERS, H, K, D
      ),
      "query": of_qkv(0),
      "key": of_qkv(1),
      "value": of_qkv(2),
      "up": over_layers(
        lambda i: np.stack(
          [tensors[f"layers.{i}.experts.{e}.up"].T for e in range(EXPERTS)]
        )
      ),
    },
  }


def write_sharded(folder, tensors):
  """Over two files, in another order than the parts'."""
  files = {"two.safetensors": {}, "one.safetensors": {}}
  for name in sorted(tensors, reverse=True):
    file = "one.safetensors" if "0" in name else "two.safetensors"
    files[file][name] = tensors[name]
  for file, of_file in files.items():
    library.save_file(of_file, folder / file)
  weight_map = {n: file for file, of_file in files.items() for n in of_file}
  index = json.dumps({"weight_map": weight_map})
  (folder / safetensors_files.INDEX).write_text(index)


def assert_same_bits(actual, expected):
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.dtype == expected.dtype and actual.shape == expected.shape
  assert actual.tobytes() == expected.tobytes()


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_loads_the_same_as_reading_everything(tmp_path, sizes):
  tensors = make_tensors()
  write_sharded(tmp_path, tensors)
  abstract = abstract_params(sizes)
  params = weights.load(tmp_path, PARTS, abstract)
  jax.tree.map(assert_same_bits, params, expected_params(tensors))
  for array, asked in zip(
    jax.tree.leaves(params), jax.tree.leaves(abstract), strict=True
  ):
    assert array.sharding == asked.sharding


@pytest.mark.parametrize("band_bytes", [1, 700, 10**6])
def test_bands_of_any_size_load_and_save_the_same(
  tmp_path, monkeypatch, band_bytes
):
  monkeypatch.setattr(weights, "_BAND_BYTES", band_bytes)
  monkeypatch.setattr(weights, "_BANDS_PER_TENSOR", 1)
  tensors = make_tensors()
  write_sharded(tmp_path, tensors)
  params = weights.load(tmp_path, PARTS, abstract_params((2, 2, 2)))
  jax.tree.map(assert_same_bits, params, expected_params(tensors))
  target = tmp_path / "saved"
  target.mkdir()
  weights.save(params, PARTS, target, dtype=jnp.float32)
  saved = library.load_file(target / safetensors_files.SINGLE)
  for name, tensor in tensors.items():
    assert_same_bits(saved[name], tensor)


@pytest.mark.parametrize(
  "source, dtype",
  [
    (np.float32, BFLOAT16),
    (np.float16, np.float32),
    (np.float16, BFLOAT16),
    (BFLOAT16, np.float32),
    (BFLOAT16, BFLOAT16),
  ],
  ids=str,
)
def test_casts_to_the_dtype_asked_for(tmp_path, source, dtype):
  tensors = make_tensors(source)
  write_sharded(tmp_path, tensors)
  params = weights.load(tmp_path, PARTS, abstract_params((1, 2, 2), dtype))
  expected = expected_params(tensors)
  jax.tree.map(
    lambda actual, plain: assert_same_bits(actual, plain.astype(dtype)),
    params,
    expected,
  )


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_saves_what_it_loaded_from_each_mesh(tmp_path, sizes):
  tensors = make_tensors(BFLOAT16)
  # One tensor of another type, as checkpoints have them.
  tensors["embed"] = make_tensors()["embed"]
  write_sharded(tmp_path, tensors)
  params = weights.load(tmp_path, PARTS, abstract_params(sizes))
  target = tmp_path / "saved"
  target.mkdir()
  told = []
  weights.save(
    params,
    PARTS,
    target,
    dtype=weights.dtypes(tmp_path),
    max_file_bytes=3000,
    progress=told.append,
  )
  index = json.loads((target / safetensors_files.INDEX).read_text())
  num_bytes = sum(tensor.nbytes for tensor in tensors.values())
  assert sum(told) == num_bytes
  assert index["metadata"] == {
    "total_parameters": sum(tensor.size for tensor in tensors.values()),
    "total_size": num_bytes,
  }
  assert index["weight_map"].keys() == tensors.keys()
  files = sorted(set(index["weight_map"].values()))
  count = len(files)
  assert files == [
    f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
  ]
  for file in files:
    saved = library.load_file(target / file)
    assert sum(x.nbytes for x in saved.values()) <= 3000 or len(saved) == 1
    assert set(saved) == {
      n for n, f in index["weight_map"].items() if f == file
    }
    for name, tensor in saved.items():
      assert_same_bits(tensor, tensors[name])


@pytest.mark.parametrize("source", [np.float16, BFLOAT16], ids=str)
def test_every_number_survives_float32(tmp_path, source):
  bits = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
  infinity = np.array(np.inf, source).view(np.uint16)
  # Which bits a nan keeps is not promised by a cast.
  is_nan = (bits & 0x7FFF) > infinity
  values = np.where(is_nan, infinity, bits).view(source)
  parts = [Part("x", ("x",), (), (256, 256), ((1,), (0,)))]
  mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
  split = jax.NamedSharding(mesh, P("fsdp", "tensor"))
  abstract = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=split)
  library.save_file({"x": values}, tmp_path / safetensors_files.SINGLE)
  params = weights.load(tmp_path, parts, {"x": abstract})
  assert_same_bits(params["x"], values.T.astype(np.float32))
  weights.save(params, parts, tmp_path, dtype=source)
  saved = library.load_file(tmp_path / safetensors_files.SINGLE)
  assert_same_bits(saved["x"], values)


def test_wider_numbers_come_first_in_a_file(tmp_path):
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  array = jax.device_put(jnp.ones(3), jax.NamedSharding(mesh, P()))
  parts = [Part(name, (name,), (), (3,), ((0,),)) for name in "ab"]
  weights.save(
    {"a": array, "b": array},
    parts,
    tmp_path,
    dtype={"a": np.float16, "b": np.float32},
  )
  found = safetensors_files.tensors(tmp_path)
  # After an odd number of halves, b would begin in the middle of a number.
  assert found["b"].start + 3 * 4 == found["a"].start
  assert found["b"].start % 4 == 0


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_what_several_devices_hold_is_read_once(tmp_path, monkeypatch, sizes):
  tensors = make_tensors()
  write_sharded(tmp_path, tensors)
  read, told = [], []
  preadv = os.preadv
  monkeypatch.setattr(
    os, "preadv", lambda *args: read.append(preadv(*args)) or read[-1]
  )
  weights.load(tmp_path, PARTS, abstract_params(sizes), progress=told.append)
  total = sum(tensor.nbytes for tensor in tensors.values())
  assert (sum(told), sum(read)) == (total, total)


def test_extra_tensors_are_refused_unless_ignorable(tmp_path):
  extra = {f"rotary.{i}.inv_freq": np.ones(2, np.float32) for i in range(6)}
  write_sharded(tmp_path, make_tensors() | extra)
  with pytest.raises(ValueError, match="only in the folder: .* and 2 more"):
    weights.load(tmp_path, PARTS, abstract_params())
  weights.load(
    tmp_path,
    PARTS,
    abstract_params(),
    is_ignorable=lambda name: name.endswith("inv_freq"),
  )


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"embed": None}, "missing in the folder: embed"),
    (
      {"embed": np.zeros((V + 1, D), np.float32)},
      r"of another shape: embed \[41, 16\] instead of \[40, 16\]",
    ),
    (
      {"layers.1.qkv": np.zeros((2 * H * K, D), np.float32)},
      r"layers.1.qkv \[64, 16\] instead of \[96, 16\]",
    ),
    (
      {"embed": np.zeros((V, D), np.int64)},
      "of a dtype other than F32, F16, BF16: embed I64",
    ),
  ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, changes, message):
  tensors = make_tensors() | changes
  write_sharded(tmp_path, {n: t for n, t in tensors.items() if t is not None})
  with pytest.raises(ValueError, match=message) as error:
    weights.load(tmp_path, PARTS, abstract_params())
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "parts, message",
  [
    (PARTS[1:], r"embedding \[40, 16\] is not made up"),
    (PARTS[:-1], r"layers/up \[3, 2, 16, 24\] is not made up"),
    (
      [PARTS[0]._replace(shape=(V, D + 1)), *PARTS[1:]],
      r"embedding \[40, 16\] is not made up",
    ),
    ([PARTS[0]._replace(offset=3), *PARTS[1:]], "embed is not made up"),
    (
      [*PARTS, PARTS[0]._replace(name="x", path=("x",))],
      "x is no parameter",
    ),
  ],
)
def test_parts_that_do_not_make_up_the_parameters_are_named(
  tmp_path, parts, message
):
  write_sharded(tmp_path, make_tensors())
  with pytest.raises(ValueError, match=message):
    weights.load(tmp_path, parts, abstract_params())


def test_shards_that_are_no_rectangles_are_refused(tmp_path):
  mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
  split = jax.NamedSharding(mesh, P(None, "tensor"))
  abstract = {"x": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=split)}
  library.save_file(
    {"x": np.zeros(32, np.float32)}, tmp_path / safetensors_files.SINGLE
  )
  parts = [Part("x", ("x",), (), (8, 4), ((0, 1),))]
  with pytest.raises(ValueError, match="Axis 1 of x is split over tensor"):
    weights.load(tmp_path, parts, abstract)


def test_saving_as_another_dtype_is_refused(tmp_path):
  params = jax.tree.map(
    lambda array: jnp.zeros(array.shape, device=array.sharding),
    abstract_params(),
  )
  with pytest.raises(ValueError, match="embed cannot be saved as int8"):
    weights.save(params, PARTS, tmp_path, dtype=jnp.int8)


PROCESS = """
  import os, sys
  import jax
  import numpy as np

  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 2)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  address, index, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
  jax.distributed.initialize(address, num_processes=2, process_id=index)
  sys.path.insert(0, os.path.dirname(os.environ["TEST_FILE"]))
  import hf_weights_test as test
  from dpop_jax.hf import weights

  read = []
  preadv = os.preadv
  def counted(*args):
    read.append(preadv(*args))
    return read[-1]

  runs = (1, 4, 1, 1), (1, 4, 1, 2), (1, 1, 4, 1), (2, 2, 1, 1)
  for *sizes, stride in runs:
    abstract = test.abstract_params(sizes, stride=stride)
    read.clear()
    os.preadv = counted
    told = []
    params = weights.load(folder, test.PARTS, abstract, progress=told.append)
    os.preadv = preadv
    expected = test.expected_params(test.make_tensors(test.BFLOAT16))
    for actual, plain in zip(
      jax.tree.leaves(params), jax.tree.leaves(expected), strict=True
    ):
      for shard in actual.addressable_shards:
        np.testing.assert_array_equal(
          shard.data, plain[shard.index].astype(np.float32)
        )
    name = "x".join(map(str, (*sizes, stride)))
    target = os.path.join(folder, name)
    weights.save(
      params, test.PARTS, target, dtype=test.BFLOAT16, max_file_bytes=4000
    )
    print("found", name, sum(told), sum(read), flush=True)
"""


@pytest.mark.slow
def test_two_processes_each_read_their_part_and_save_together(tmp_path):
  tensors = make_tensors(BFLOAT16)
  write_sharded(tmp_path, tensors)
  # Tensors that are not split over the axis are whole on both processes.
  total = sum(tensor.nbytes for tensor in tensors.values())
  whole = {
    "1x4x1x1": LAYERS * 2 * (D + H * K),
    "1x4x1x2": LAYERS * 2 * (D + H * K),
    "1x1x4x1": LAYERS * 2 * D,
    "2x2x1x1": total,
  }
  for name in whole:
    (tmp_path / name).mkdir()
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  script = textwrap.dedent(PROCESS)
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", script, address, str(index), str(tmp_path)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=os.environ | {"TEST_FILE": __file__},
    )
    for index in range(2)
  ]
  outputs = [process.communicate(timeout=120) for process in processes]
  for process, (_, errors) in zip(processes, outputs, strict=True):
    assert process.returncode == 0, errors
  for output, _ in outputs:
    # The collectives' library prints, too.
    lines = [x for x in output.splitlines() if x.startswith("found ")]
    assert len(lines) == len(whole)
    for line in lines:
      name, told, read = line.removeprefix("found ").split()
      assert int(told) == whole[name] + (total - whole[name]) // 2
      # Columns of rows as short as these are cut out of whole rows, but rows
      # that belong to others are left alone.
      if name == "1x1x4x1":
        out = LAYERS * 2 * D * H * K
        assert int(read) == int(told) + out // 2
  for name in whole:
    found = safetensors_files.tensors(tmp_path / name)
    assert found.keys() == tensors.keys()
    for file in {tensor.file for tensor in found.values()}:
      for tensor, value in library.load_file(tmp_path / name / file).items():
        assert_same_bits(value, tensors[tensor])
