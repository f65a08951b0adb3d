"""PEFT's own tests, taken from the sdist of the installed version and pointed at our configs without editing them.

PEFT's wheels hold no tests, its sdists do. The sdist is fetched once by pip into pytest's cache; nothing of it is kept
in this repository. A parametrised test keeps a reference to its list of cases, so the lists are filled with ours after
the module is imported and before pytest reads it.
"""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys
import tarfile
import types
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

from growthring.adapters import BottleneckConfig, LargoConfig, PrefixTokensConfig, PromptTokensConfig

PACKAGE = "peft_upstream_tests"
OURS = (BottleneckConfig, PrefixTokensConfig, PromptTokensConfig, LargoConfig)
TOKENS = (PrefixTokensConfig, PromptTokensConfig)

# Upstream tests that say nothing about our adapters. The first part is found in the test's name.
ALL_SKIP = {
    "weighted_combination": "LoRA and IA3 only, upstream too",
    "learnable_bias": "these adapters train none of the model's biases",
}

# ... and about those that are no change of a weight.
SKIPPED = {
    "merg": "these adapters cannot be merged; that this is refused is tested in tests/adapters",
    "idempotent": "these adapters cannot be merged; that this is refused is tested in tests/adapters",
    "lora_conversion": "what these adapters add is no linear function of a layer's input, so no LoRA equals it",
    "mixed_adapter_batches": "several adapters in one batch are not offered",
}


NOT_IDENTITY = "upstream expects a new adapter to change nothing; learned tokens change attention from the start"
SKIPPED_FOR = {
    (PromptTokensConfig, "test_disable_adapters"): NOT_IDENTITY,
    (PromptTokensConfig, "test_prepare_for_training_parametrized"): "its tokens stand among the embeddings, and train",
    (PromptTokensConfig, "test_in_features_out_features_exposed"): "it wraps embeddings, which have no in_features",
}


def fetch(cache: Path) -> Path:
    """Folder with the package of upstream tests; skips if the sdist cannot be had."""
    folder = cache / f"peft-{peft.__version__}"
    package = folder / PACKAGE
    if not (package / "__init__.py").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run(
            [*pip, "--no-binary", ":all:", "--dest", str(folder), f"peft=={peft.__version__}"],
            capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip
        archive = folder / f"peft-{peft.__version__}.tar.gz"
        if done.returncode or not archive.is_file():
            lines = done.stderr.strip().splitlines() or ["no sdist came"]
            pytest.skip(f"the sdist of peft {peft.__version__} cannot be had: {lines[-1]}", allow_module_level=True)
        package.mkdir(exist_ok=True)
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                path = Path(member.name)
                if member.isfile() and path.match("peft-*/tests/*.py") and path.name != "conftest.py":
                    stream = tar.extractfile(member)
                    assert stream is not None
                    (package / path.name).write_bytes(stream.read())
        (package / "__init__.py").write_text("", encoding="utf-8")
    return folder


def load(name: str, cache: Path) -> Any:
    """An upstream test module with our configs in place of PEFT's."""
    folder = fetch(cache)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        import diffusers  # noqa: F401
    except ImportError:  # upstream imports it for tests of image pipelines, which are not run here
        stub = types.ModuleType("diffusers")
        stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
        sys.modules["diffusers"] = stub
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(f"{PACKAGE}.{name}")
    finally:
        if getattr(sys.modules.get("diffusers"), "__spec__", None) is None:
            sys.modules.pop("diffusers", None)
    if hasattr(module, "set_init_weights_false"):
        original = module.set_init_weights_false
        module.set_init_weights_false = lambda config_cls, kwargs: (
            dict(kwargs) if config_cls in TOKENS else original(config_cls, kwargs)  # random from the start anyway
        )
    if hasattr(module, "PREFIXES"):  # older versions
        module.PREFIXES.update({cls: PEFT_TYPE_TO_PREFIX_MAPPING[cls().peft_type] for cls in OURS})
    for part in (module, sys.modules[f"{PACKAGE}.testing_common"]):
        part.hub_online_once = contextlib.nullcontext  # every model is in a folder
        if hasattr(part, "_skip_if_merging_not_supported"):  # called where a test has done all but merging
            part._skip_if_merging_not_supported = _cannot_merge
        if hasattr(part, "_skip_if_conv1d_not_supported"):
            part._skip_if_conv1d_not_supported = _conv1d_for(part._skip_if_conv1d_not_supported)
    sys.modules[f"{PACKAGE}.testing_common"].RoadConfig = LargoConfig  # type: ignore[attr-defined]  # mixed batches
    return module


def _cannot_merge(*case: Any) -> None:
    if LargoConfig not in case:
        pytest.skip("all but the merging ran: " + SKIPPED["merg"])


def _conv1d_for(skip: Any) -> Any:
    return lambda model_id, config_cls, kwargs: config_cls is LargoConfig or skip(model_id, config_cls, kwargs)


def refill(module: Any, **lists: Any) -> None:
    """Put our cases into lists that upstream parametrises with; a list that this version lacks is left out."""
    for name, values in lists.items():
        if hasattr(module, name):
            getattr(module, name)[:] = values


def wanted(params: dict[str, Any]) -> bool:
    """Whether a collected test is about one of our configs."""
    return any(value in OURS for value in params.values() if isinstance(value, type))


def reason_to_skip(name: str, params: dict[str, Any]) -> str | None:
    """Why a test does not apply."""
    reasons = [reason for part, reason in ALL_SKIP.items() if part in name]
    if LargoConfig not in params.values():
        reasons += [reason for part, reason in SKIPPED.items() if part in name]
    reasons += [
        SKIPPED_FOR[value, name]
        for value in params.values()
        if isinstance(value, type) and (value, name) in SKIPPED_FOR
    ]
    return next(iter(reasons), None)
