"""What several test files share: private data, the command, a small trained Thinker."""

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


@pytest.fixture
def records(tmp_path, monkeypatch) -> Path:
    """The folder where records of this test go."""
    monkeypatch.setenv("MMSA_RECORDS", str(tmp_path / "records"))
    return tmp_path / "records"


def command(*arguments) -> int:
    """Exit status of ``mmsa-book`` in this process; capsys has what it printed."""
    from mmsa_lib.cli import main

    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return stop.value.code or 0


# A small Thinker, what it learns from ten clips, and where that is kept. Tests leave
# these as they are. `thinkers` loads torch, so it is imported where it is asked for.


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    from thinkers import write_backbone

    return write_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="session")
def chosen():
    from thinkers import ten_clips

    return ten_clips()


@pytest.fixture(scope="session")
def clip_folder(chosen, tmp_path_factory):
    from thinkers import write_folder

    return write_folder(tmp_path_factory.mktemp("clips"), chosen)


@pytest.fixture(scope="session")
def corpus(chosen):
    from thinkers import MEDIA

    from mmsa_lib.corpora.media import clip_corpus

    return clip_corpus(chosen, MEDIA)


@pytest.fixture(scope="session")
def handful(corpus):
    """The training clips, validated on themselves: what a model can overfit."""
    from mmsa_lib.corpora.schema import Corpus

    return Corpus(
        "handful", corpus.card, {"train": corpus.train, "valid": corpus.train}
    )


@pytest.fixture(scope="session")
def overfit(backbone, handful):
    """A readout that knows the handful by heart, frozen."""
    from thinkers import train_readout

    return train_readout(backbone, handful)


@pytest.fixture(scope="session")
def twin(backbone, handful):
    """The same of the twin."""
    from thinkers import train_twin

    return train_twin(backbone, handful)


@pytest.fixture(scope="session")
def saved(overfit, backbone, tmp_path_factory):
    from thinkers import keep

    return keep(overfit.module, tmp_path_factory.mktemp("saved"), backbone)


@pytest.fixture(scope="session")
def saved_twin(twin, backbone, tmp_path_factory):
    from thinkers import keep

    return keep(twin.module, tmp_path_factory.mktemp("twin"), backbone)
