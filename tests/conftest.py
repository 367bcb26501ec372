"""Makes silent mistakes loud, and gives every test eight devices."""

import importlib.util
import os
import pathlib
from unittest import mock

import gcs_emulator
import hypothesis
import jax
import pytest

# On accelerators results differ in the last digits, and there may be only one.
if "JAX_PLATFORMS" not in os.environ:
  jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Most of a test's time goes into LLVM's optimisations, which come after all
# that XLA does to a program. Also for the processes that tests start.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
jax.config.update(
  "jax_disable_most_optimizations",
  os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1",
)
# A cache that outlives a run would hide what a change does to compilation.
jax.config.update("jax_enable_compilation_cache", False)

# No test may need a network. The libraries read these when they are imported,
# which is after this file.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# The first example of a test may compile for seconds, hence no deadline. In CI
# the examples are always the same, so that only a change can make it fail.
hypothesis.settings.register_profile(
  "dpop_jax",
  deadline=None,
  max_examples=30,
  derandomize="CI" in os.environ,
)
hypothesis.settings.load_profile("dpop_jax")


def pytest_runtest_logreport(report):
  """Names a failure when it happens: a run that is ended has no summary."""
  if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
    print(f"\nFAILED {report.nodeid} ({report.when})", flush=True)


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
  """The folder of real data sets, tokenizers and weights; skips without it."""
  folder = os.environ.get("DPOP_SHARED_DATA", "")
  if not folder:
    pytest.skip("needs real data: DPOP_SHARED_DATA names no folder of it")
  path = pathlib.Path(folder).resolve()
  if not path.is_dir():
    raise ValueError(f"DPOP_SHARED_DATA should be a folder, got {folder!r}.")
  return path


@pytest.fixture(scope="module")
def one_device_and_shared_compilations(tmp_path_factory):
  """Runs of one program compile it once, and each on one device as in a shell.

  The cache is as old as the tests of a file. Yields JAX's options.
  """
  from dpop_jax import sharding

  options = {
    "jax_enable_compilation_cache": True,
    "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
    "jax_persistent_cache_min_compile_time_secs": 0.1,
  }
  old = {name: getattr(jax.config, name) for name in options}
  make_mesh = sharding.make_mesh
  one_device = lambda config: make_mesh(config, jax.devices()[:1])
  with mock.patch.object(sharding, "make_mesh", one_device):
    for name, value in options.items():
      jax.config.update(name, value)
    yield options
    for name, value in old.items():
      jax.config.update(name, value)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def gcs(tmp_path_factory):
  """A `gcs_emulator.Emulator` that gs:// leads to; skips without gcsfs."""
  if importlib.util.find_spec("gcsfs") is None:
    pytest.skip("needs gcsfs: pip install 'dpop_jax[gcs]'")
  with (
    gcs_emulator.Emulator() as emulator,
    pytest.MonkeyPatch.context() as patch,
  ):
    # Of gcsfs and google-cloud-storage, and of TensorStore.
    patch.setenv("STORAGE_EMULATOR_HOST", emulator.url)
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", emulator.url)
    # Whoever runs the tests may be logged in, and need not be asked.
    patch.setenv("FSSPEC_GCS_TOKEN", "anon")
    patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    # This asks by gRPC what kind of bucket it is.
    patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    import fsspec.config

    patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
    yield emulator
