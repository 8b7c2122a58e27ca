"""Both official clients, every feature, whole and streamed (`python -m tests.scripted.features` shows the table)."""

from __future__ import annotations

from pathlib import Path

from tests.scripted import features


def test_every_feature_works_for_both_clients_whole_and_streamed(tmp_path: Path) -> None:
    with features.serving_script(tmp_path, "hermes") as server:
        verdicts = features.table(server)
    assert {verdict for both in verdicts.values() for verdict in both} == {"ok"}, verdicts
    assert len(verdicts) == len(features.FEATURES)
