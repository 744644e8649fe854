import pytest

from hub import import_official, manifest, mirror, model_cards, publish, verify


@pytest.mark.parametrize("command", [import_official, manifest, mirror, model_cards, publish, verify])
def test_help_teaches_by_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    name = command.__name__.rpartition(".")[2]
    assert f"python -m hub.{name}" in text.partition("example")[2]


@pytest.mark.parametrize("command", [import_official, mirror, publish, verify])
def test_dry_run_is_offered(command, capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert "--dry-run" in capsys.readouterr().out
