from pathlib import Path

import pytest

from resafe.backends._load import open_backend
from resafe.backends.batch import BatchBackend
from resafe.backends.endpoint import EndpointBackend
from resafe.errors import ResafeError


def test_a_served_model_is_named_with_its_address() -> None:
    found = open_backend("chat:org/name@main@http://127.0.0.1:8000/v1")
    assert isinstance(found, EndpointBackend)
    assert (found.model, found.base_url) == ("org/name@main", "http://127.0.0.1:8000/v1")


def test_openai_is_short_for_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k-openai")
    found = open_backend("openai:some-model")
    assert isinstance(found, EndpointBackend)
    assert (found.model, found.base_url) == ("some-model", "https://api.openai.com/v1")


def test_a_batch_needs_a_folder_for_its_notes(tmp_path: Path) -> None:
    spec = "batch:m@http://127.0.0.1:8000/v1"
    found = open_backend(spec, workdir=tmp_path)
    assert isinstance(found, BatchBackend)
    assert (found.model, found.workdir) == ("m", tmp_path)
    with pytest.raises(ResafeError, match="needs a folder"):
        open_backend(spec)


def test_a_folder_is_a_local_model_whatever_its_name(
    tmp_path: Path, aligned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resafe.backends.local import LocalBackend

    monkeypatch.chdir(tmp_path)
    Path("chat:m").symlink_to(aligned)
    for spec in ("chat:m", str(aligned), "lab"):
        assert isinstance(open_backend(spec), LocalBackend)


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("chat:m", "'chat:m' is not of the form chat:MODEL@URL."),
        ("batch:m@ftp://x", "'batch:m@ftp://x' is not of the form batch:MODEL@URL."),
        ("chat:@http://x/v1", "is not of the form chat:MODEL@URL."),
        ("chatt:m@http://x/v1", "no such back-end: 'chatt:m@http://x/v1'. Did you mean 'chat'?"),
        ("openai:", "no such back-end: 'openai:'."),
        ("no/such/folder", "no such model folder: no/such/folder"),
        ("lab:tuned", "no such back-end: 'lab:tuned'."),
    ],
)
def test_what_cannot_be_opened_is_one_line(spec: str, line: str) -> None:
    with pytest.raises(ResafeError) as error:
        open_backend(spec)
    assert line in str(error.value)
    assert "\n" not in str(error.value)
