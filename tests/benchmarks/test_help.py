"""Benchmarks that take bare arguments explain themselves, too."""

import importlib

import pytest


@pytest.mark.parametrize("script", ["data_wait", "startup", "upcycle_routing"])
def test_help_is_no_argument(script, monkeypatch, capsys):
    module = importlib.import_module(script)
    monkeypatch.setattr("sys.argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0 and f"python benchmarks/{script}.py" in capsys.readouterr().out
