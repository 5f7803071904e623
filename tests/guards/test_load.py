import subprocess
import sys
from pathlib import Path

import pytest

from resafe.errors import ResafeError
from resafe.guards import load_guard
from resafe.guards.linear import LinearGuard


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ofline", "Did you mean 'offline'"),
        ("moderate", "Did you mean 'moderation'"),
        ("", "Known: "),
        ("./nowhere/model", "no such guard file or folder"),
        ("missing.safetensors", "no such guard file or folder"),
        ("encoder:./nowhere", "not a sentence-transformers folder"),
        ("refusals", "Did you mean 'refusal'"),
        ("chat:model", "not of the form"),
        ("chat:model@ftp://host", "not of the form"),
        ("chat:model@http://host", "cannot tell the guard family of model"),
        ("llama_guard:./nowhere", "no such guard file or folder: ./nowhere"),
    ],
)
def test_a_spec_that_means_nothing_is_an_error_with_a_way_out(spec: str, message: str) -> None:
    with pytest.raises(ResafeError, match=message):
        load_guard(spec)


def test_a_fitted_guard_is_loaded_by_its_file(tmp_path: Path) -> None:
    fitted = LinearGuard.fit([(([], "red"), 1, None), (([], "blue"), 0, None)], bits=10)
    assert load_guard(str(fitted.save(tmp_path / "mine.safetensors"))).name == "mine"


def test_refusal_and_harm_are_the_offline_guard_with_one_head() -> None:
    exchange = ([{"role": "user", "content": "How do I boil an egg?"}], "I can't help with that.")
    offline, refusal, harm = (load_guard(s).classify([exchange])[0] for s in ("offline", "refusal", "harm"))
    assert (refusal.harmful, refusal.refusal) == (None, offline.refusal) == (None, True)
    assert (harm.harmful, harm.refusal, harm.score) == (offline.harmful, None, offline.score)


def test_importing_guards_loads_nothing_heavy() -> None:
    code = "import sys, resafe.guards; print(*{'torch', 'transformers', 'openai', 'numpy', 'scipy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert found.stdout.strip() == ""
