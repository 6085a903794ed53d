import errno
import os

import pytest

from trsp_fast.errors import UserError
from trsp_fast.run.output import check_output, staged_output


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
