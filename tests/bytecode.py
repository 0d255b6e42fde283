"""Compiles the sources to bytecode, which an installed package has, and the tests, with pytest's assertions in it."""

from __future__ import annotations

import compileall
import gc
import multiprocessing
import os
import re
from pathlib import Path

import pytest
from _pytest.assertion import rewrite

from tests.harness import ROOT

REWRITTEN = re.compile(r"/(test_[^/]*|conftest)\.py$")


def compile_sources() -> None:
    """Compile changed sources. With PYTHONDONTWRITEBYTECODE each process would compile all of them: 0.4 s of its CPU,
    and a run of the suite starts hundreds.
    """
    for package in ("receiver", "storage"):
        compileall.compile_dir(ROOT / package, quiet=1)
    compileall.compile_dir(ROOT / "tests", quiet=1, rx=REWRITTEN)


def compile_tests(config: pytest.Config) -> None:
    """Compile the tests that have changed, as pytest does when it imports one. Each of xdist's workers would do it:
    14.5 s of CPU to collect all tests, and 6.8 s with their bytecode."""
    files = [file for file in (ROOT / "tests").rglob("*.py") if REWRITTEN.search(str(file))]
    stale = [file for file in files if rewrite._read_pyc(file, _cached(file)) is None]
    parts = [stale[start :: os.cpu_count() or 1] for start in range(os.cpu_count() or 1)]
    forks = [
        multiprocessing.get_context("fork").Process(target=_compile, args=(part, config)) for part in parts if part
    ]
    for fork in forks:
        fork.start()
    for fork in forks:
        fork.join()


def _compile(files: list[Path], config: pytest.Config) -> None:
    gc.disable()  # it would search each syntax tree many times, which is half of the CPU
    for file in files:
        source_hash, code = rewrite._rewrite_test(file, config)
        rewrite.try_makedirs(_cached(file).parent)
        rewrite._write_pyc(config.stash[rewrite.assertstate_key], code, source_hash, _cached(file))


def _cached(file: Path) -> Path:
    return rewrite.get_cache_dir(file) / f"{file.stem}{rewrite.PYC_TAIL}"
