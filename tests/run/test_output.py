import errno
import os

import pytest

from trsp_fast.errors import UserError
from trsp_fast.run import output
from trsp_fast.run.output import RUN, STATE, check_output, resumable_output, staged_output


def test_the_output_appears_whole_at_the_end(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged_output(out) as stage:
        (stage / "a").write_text("1")
        assert not out.exists()
    assert (out / "a").read_text() == "1"
    assert os.listdir(out.parent) == ["out"]


def fail(out, error):
    with staged_output(out) as stage:
        (stage / "a").write_text("1")
        raise error


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_nothing_is_left_when_the_work_fails(tmp_path, error):
    with pytest.raises(type(error)):
        fail(tmp_path / "out", error)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
def test_a_full_disk_is_one_sentence(tmp_path, number):
    with pytest.raises(UserError, match="no space left"):
        fail(tmp_path / "out", OSError(number, os.strerror(number)))
    assert os.listdir(tmp_path) == []


def test_other_errors_keep_their_kind(tmp_path):
    with pytest.raises(OSError, match="broken"):
        fail(tmp_path / "out", OSError(errno.EIO, "broken"))


def test_folders_made_on_the_way_vanish_with_a_failure(tmp_path):
    check_output(tmp_path / "a" / "b" / "out")
    assert os.listdir(tmp_path) == []
    with pytest.raises(RuntimeError):
        fail(tmp_path / "a" / "b" / "out", RuntimeError("x"))
    assert os.listdir(tmp_path) == []


def test_a_link_to_an_empty_folder_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with staged_output(tmp_path / "link") as stage:
        (stage / "a").write_text("1")
    assert (tmp_path / "real" / "a").read_text() == "1"


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with staged_output(tmp_path / "out") as stage:
        (stage / "a").write_text("1")
    assert (tmp_path / "out" / "a").exists()


def test_bad_outputs_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(UserError, match="is a file"):
        check_output(tmp_path / "file")
    with pytest.raises(UserError, match="is not empty"):
        check_output(tmp_path / "full")
    with pytest.raises(UserError, match="cannot be created"):
        check_output(tmp_path / "file" / "below")


def test_outputs_that_cannot_have_their_name_are_refused(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="a link that leads back to itself"):
        check_output(tmp_path / "loop")
    with pytest.raises(UserError, match=r"cannot be created \(File name too long\)"):
        check_output(tmp_path / ("n" * 243))
    assert os.listdir(tmp_path) == ["loop"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_in_the_way_of_the_runs_own_folder_stays(tmp_path, kind):
    stage, kept = tmp_path / ".out.unfinished", tmp_path / "kept"
    kept.mkdir()
    (kept / "precious").write_text("1")
    if kind == "link":
        stage.symlink_to(kept)
    else:
        stage.write_text("1")
    with pytest.raises(UserError, match=r"\.out\.unfinished' is no folder"), resumable_output(tmp_path / "out"):
        pass
    assert (kept / "precious").exists()
    assert os.path.lexists(stage)


def test_a_finished_run_is_not_resumed_and_loses_its_leftovers(tmp_path):
    out = tmp_path / "out"
    (out / STATE).mkdir(parents=True)
    (out / RUN / "run.json").write_text("{}")
    with pytest.raises(UserError, match="nothing to resume"):
        check_output(out, resume=True)
    assert not (out / STATE).exists()
    with pytest.raises(UserError, match="is not empty"):
        check_output(out)


def test_a_run_that_lost_its_name_leaves_the_folder_of_the_next_one_alone(tmp_path):
    stage = tmp_path / ".out.unfinished"
    run = resumable_output(tmp_path / "out")
    run.__enter__().rename(tmp_path / "elsewhere")
    stage.mkdir()
    (stage / "of another run").write_text("1")
    assert not run.__exit__(RuntimeError, RuntimeError(), None)
    assert (stage / "of another run").exists()


def test_the_output_of_a_run_that_has_just_finished_is_seen(tmp_path, monkeypatch):
    original = output._exclusive

    def finish_first(stage, out):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("{}")
        return original(stage, out)

    monkeypatch.setattr(output, "_exclusive", finish_first)
    with pytest.raises(UserError, match="is not empty"), resumable_output(tmp_path / "out"):
        pytest.fail("it must not start")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"restart": True}])
def test_a_run_at_work_keeps_its_folder_to_itself(tmp_path, options):
    def second():
        with resumable_output(tmp_path / "out", **options):
            pass

    with resumable_output(tmp_path / "out") as stage:
        (stage / "a").write_text("1")
        with pytest.raises(UserError, match="another run is at work on"):
            second()
        assert (stage / "a").exists()
    assert (tmp_path / "out" / "a").read_text() == "1"
