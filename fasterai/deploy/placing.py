"Put a file in its place: at once or not at all, and what the system refuses names the user's path."
import hashlib
import os
import secrets
import stat
from contextlib import contextmanager, suppress

try:
    import fcntl
except ImportError:
    fcntl = None  # Windows


def checked_path(
    path,  # what the user gave
) -> str:
    "Return a path as text; `TypeError` or `ValueError` if it cannot be one."
    try: text = os.fspath(path)
    except TypeError: text = None
    if not isinstance(text, str):
        raise TypeError(f'path: got {path!r}, expected a str or os.PathLike')
    try: possible = b'\0' not in os.fsencode(text)
    except UnicodeEncodeError: possible = False
    if possible: return text
    raise ValueError(f'path: got {text!r}, expected characters that the system allows in names')


@contextmanager
def named_errors(
    path: str,  # as the user gave it
):
    "Make each `OSError` of the system in a `with` block name the user's path, whatever file it was about."
    try: yield
    except OSError as error:
        if error.errno is None: raise  # not the system's
        raise OSError(error.errno, error.strerror, path) from error  # of the class of that number


def open_plain(
    path: str,  # as the user gave it
):
    """Open a plain file to read its bytes.

    A folder, a device or a pipe raises a `ValueError`, and what the system refuses an `OSError`."""
    with named_errors(path):
        _check_plain(path, os.stat(path))  # before it is opened: a pipe would wait for its other end
        return open(path, 'rb')


def _check_plain(path, status):
    if stat.S_ISREG(status.st_mode): return
    raise ValueError(f'path: got {path!r}, which is a folder, a device or a pipe, expected a plain file')


def destination(
    path: str,  # as the user gave it
) -> tuple:  # the file to replace, behind links; and its status, None if there is none
    "Find where a file is to be written; `OSError` or `ValueError` if that is no place for one."
    with named_errors(path):
        try: old = os.stat(path)
        except (FileNotFoundError, NotADirectoryError): old = None
        target = os.path.realpath(path) if os.path.islink(path) else path
    is_folder = old is not None and stat.S_ISDIR(old.st_mode)
    if is_folder or not os.path.basename(path) or not os.path.isdir(_folder(target)):
        raise FileNotFoundError(f'path: got {path!r}, expected a file in a folder that exists')
    if old is not None: _check_plain(path, old)
    return target, old


def _folder(target): return os.path.dirname(target) or '.'


@contextmanager
def replacing(
    path: str,  # as the user gave it
):
    """Give a `with` block a new file to write, which takes the place of an old one if the block ends well.

    An old file keeps its mode. Until the end, the new one has a name as `.fasterai-12345678-…`; a process
    that is killed leaves it, and the next save to the same path removes it.
    What the system refuses raises an `OSError`."""
    target, old = destination(path)
    with named_errors(path):
        _remove_leftovers(target)
        handle, temporary = _create(target, old)
        try:
            with open(handle, 'wb') as file:
                if old is not None: _take_over(handle, old)
                yield file
                file.flush()
                os.fsync(handle)
                if fcntl is None: file.close()  # Windows moves no open file
                os.replace(temporary, target)
        except BaseException:
            with suppress(OSError): os.unlink(temporary)
            raise


def _prefix(target):
    "Return how the temporary names of a file begin; they are short, however long its own name is."
    name = os.path.basename(target)
    return f'.fasterai-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}-'


def _create(target, old):
    "Create a temporary file beside its target, and lock it: the lock goes when this process does."
    mode = 0o666 if old is None else 0o600  # the system takes the umask off
    while True:
        temporary = os.path.join(_folder(target), _prefix(target) + secrets.token_hex(8))
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, 'O_BINARY', 0), mode)
        if fcntl is None: return handle, temporary
        with suppress(OSError): fcntl.flock(handle, fcntl.LOCK_EX)  # some file systems have no locks
        if os.path.exists(temporary): return handle, temporary
        os.close(handle)  # another save found it before it was locked, and took it for a leftover


def _take_over(handle, old):
    "Give a new file the owner, as far as the system allows it, and the mode of the old one."
    if not hasattr(os, 'fchmod'): return  # Windows
    mode, new = stat.S_IMODE(old.st_mode), os.fstat(handle)
    if new.st_gid != old.st_gid:
        try: os.fchown(handle, -1, old.st_gid)
        except OSError: mode &= ~0o070  # another group gets nothing
    if new.st_uid != old.st_uid:
        with suppress(OSError): os.fchown(handle, old.st_uid, -1)
    os.fchmod(handle, mode)


def _remove_leftovers(target):
    "Remove the temporary files of saves to the same target whose process has ended."
    if fcntl is None: return  # no way to know
    with suppress(OSError):
        for name in os.listdir(_folder(target)):
            if name.startswith(_prefix(target)): _remove_if_left(os.path.join(_folder(target), name))


def _remove_if_left(temporary):
    with suppress(OSError):  # of another user, gone, or locked by a save that runs
        handle = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if stat.S_ISREG(os.fstat(handle).st_mode): os.unlink(temporary)
        finally: os.close(handle)
