"""Where the tests find private data and parity fixtures; both may be absent."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with real data (MMSA_SHARED, default ../shared)."""
    path = Path(os.environ.get("MMSA_SHARED", ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"no shared data at MMSA_SHARED={path}")
    return path


@pytest.fixture
def no_orphans(tmp_path) -> Iterator[None]:
    """However a test ends: what it started on its folder ends with it."""
    from processes import end_family

    yield
    end_family(tmp_path)


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """The folder with numbers from official code (MMSA_PARITY_DIR)."""
    shared = Path(os.environ.get("MMSA_SHARED", ROOT.parent / "shared"))
    path = Path(os.environ.get("MMSA_PARITY_DIR", shared / "parity"))
    if not (path / "index.json").is_file():
        pytest.skip(f"no parity fixtures at MMSA_PARITY_DIR={path}")
    return path
