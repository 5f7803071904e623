"""The catalogue: one file is one mitigation; unknown names and parameters are refused with the nearest one."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import resafe.mitigations as catalogue
from resafe.errors import ResafeError
from resafe.mitigation import HOOKS, Mitigation, Run
from resafe.mitigations import _joined, get, make, names, stack
from resafe.rows import chat


@pytest.mark.parametrize("name", names())
def test_every_mitigation_keeps_the_contract(name: str) -> None:
    kind = get(name)
    module = __import__(kind.__module__, fromlist=["_"])
    assert issubclass(kind, Mitigation)
    assert kind.title().endswith(".") and len(kind.title()) < 140, "the module docstring's first line says what it does"
    assert "arXiv" in (module.__doc__ or "") or "arxiv.org" in (module.__doc__ or ""), "the docstring names the paper"
    assert set(kind.hooks()) <= set(HOOKS) and kind.hooks()
    made = make(name)
    assert make(made.spec) == made, "a spec makes the same mitigation again"
    with pytest.raises(ResafeError, match="has no parameter 'nonsense'"):
        make({name: {"nonsense": 1}})


def test_the_four_families_are_there() -> None:
    stages = {n: get(n).stage() for n in names()}
    assert stages.items() >= {
        "mix_safety": "data", "realign_dpo": "repair", "realign_sft": "repair", "restore_weights": "repair", "filter_output": "guard"
    }.items()  # fmt: skip


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ResafeError, match="Did you mean 'mix_safety'"):
        make("mix_safty")


def test_an_unknown_parameter_is_refused_with_the_nearest() -> None:
    with pytest.raises(ResafeError, match="no parameter 'ration'. Did you mean 'ratio'"):
        make("mix_safety:ration=0.2")


@pytest.mark.parametrize("spec", ["mix_safety:ratio=lots", "mix_safety:ratio=-1", "mix_safety:ratio", "mix_safety:n=1,ratio=1", "restore_weights:strength=2"])
def test_a_value_out_of_range_is_refused(spec: str) -> None:
    with pytest.raises(ResafeError):
        make(spec)


def test_command_line_and_mapping_make_the_same() -> None:
    text = make("restore_weights:strength=auto,grid=[0.2,0.4],margin=0.01")
    assert text == make({"restore_weights": {"strength": "auto", "grid": [0.2, 0.4], "margin": 0.01}})


def test_a_stack_refuses_one_name_twice() -> None:
    with pytest.raises(ResafeError, match="given twice"):
        stack(["mix_safety", "mix_safety:ratio=0.3"])


def test_two_sides_of_a_duplicate_name_are_named() -> None:
    point = EntryPoint("mix_safety", "elsewhere:Mix", catalogue.GROUP)
    with pytest.raises(ResafeError, match="resafe.mitigations.mix_safety and elsewhere:Mix"):
        _joined({"mix_safety": "resafe.mitigations.mix_safety"}, [point])


def test_a_third_party_joins_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("other_mix", "resafe.mitigations.mix_safety:MixSafety", catalogue.GROUP)
    monkeypatch.setattr(catalogue, "_registry", lambda: {"other_mix": point})
    assert make("other_mix:ratio=0.5").mitigation.model_dump()["ratio"] == 0.5


def test_what_a_method_cannot_be_applied_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"load_in_4bit": true}}')
    run = Run(output=tmp_path / "out", tuned=tmp_path, refusals=[chat("bad", "no")])
    for name in ("realign_sft", "realign_dpo"):
        with pytest.raises(ResafeError, match="4 or 8 bits"):
            make(name).mitigation.check(name, run)


def test_needs_are_checked_before_any_work() -> None:
    run = Run(output=Path("nowhere"))
    with pytest.raises(ResafeError, match="--aligned"):
        make("restore_weights").mitigation.check("restore_weights", run)
    with pytest.raises(ResafeError, match="safety rows"):
        make("mix_safety").mitigation.check("mix_safety", run)
