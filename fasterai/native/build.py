"Compile C code with the compiler of this machine, once, into a folder that only the user can write."
import hashlib
import os
import platform
import shlex
import stat
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

FLAGS = ('-std=gnu11', '-O3', '-fPIC', '-shared', '-fno-math-errno', '-fno-trapping-math')
# how compilers are asked for all that this processor has; the first that the compiler takes. Without the
# second flag clang computes vectors of 512 bits in halves.
NATIVE = (('-march=native', '-mprefer-vector-width=512'), ('-march=native',), ('-mcpu=native',), ())
VARIANTS = {'native': (), 'avx2': ('-mno-avx512f', '-DLANES=8'), 'plain': ('-DLANES=4',)}
PATIENCE = 120  # seconds that a compiler may take


class Unavailable(Exception):
    "Say in one line why there are no kernels here."


def built(
    source: Path,  # a file of C
    variant: str = 'native',  # a key of `VARIANTS`
) -> Path:  # a shared library
    "Return the compiled source, compiled now if it is not there; `Unavailable` says why not."
    compiler, flags = compiler_command(), (*FLAGS, *VARIANTS[variant])
    name = f'{source.stem}-{_key(source, compiler, flags)}.so'
    try:
        folder = cache_folder()
        library = folder / name
        if _is_whole(library): return library
        with _locked(folder / 'lock'):
            # another process may have been faster
            if not _is_whole(library): _compile(source, compiler, flags, library)
        return library
    # without a home folder there is a RuntimeError
    except (OSError, RuntimeError) as error:
        raise Unavailable(f'the cache cannot be used: {error}') from error


def compiler_command() -> list:  # of words
    "Return the compiler of this machine: what CC names, else cc."
    return shlex.split(os.environ.get('CC') or 'cc')


def _key(source, compiler, flags):
    "Return what tells one build from all others: source, flags, compiler and processor."
    found = hashlib.sha256(source.read_bytes())
    for part in (*compiler, *flags, str(NATIVE), _version(compiler), _processor()):
        found.update(b'\0' + part.encode())
    return found.hexdigest()[:32]


def _version(compiler):
    done = _call([*compiler, '--version'])
    if done.returncode: raise Unavailable(f'{compiler[0]} --version failed: {_first_line(done.stderr)}')
    return done.stdout


def _call(command):
    try: return subprocess.run(command, capture_output=True, text=True, errors='replace', timeout=PATIENCE)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f'no C compiler: {error}; install one, or name it in CC') from error


def _first_line(text): return text.strip().splitlines()[0][:200] if text.strip() else 'without a word'


def _processor():
    "Describe this processor by what it can do: a home folder may be shared by different machines."
    told = _cpuinfo()
    if not told: return ' '.join((platform.system(), platform.machine(), platform.processor()))
    # `CPU part` and `Features` are Arm's
    names = ('model name', 'cpu family', 'model', 'flags', 'CPU implementer', 'CPU part', 'Features')
    return ' '.join([platform.machine(), *(told.get(name, '') for name in names)])


def processor_flags() -> set:  # of str; empty where it is not known
    "Return what Linux says that this processor can do."
    told = _cpuinfo()
    return {*told.get('flags', '').split(), *told.get('Features', '').split()}


def _cpuinfo():
    "Return what /proc/cpuinfo says of the first processor; empty where there is none."
    try: lines = Path('/proc/cpuinfo').read_text(errors='replace').splitlines()
    except OSError: return {}
    told = {}
    for line in lines:
        name, _, value = line.partition(':')
        told.setdefault(name.strip(), value.strip())
    return told


def cache_folder() -> Path:
    "Return the folder of compiled kernels, the user's alone; `Unavailable` where others could write to it."
    if os.name != 'posix': raise Unavailable(f'kernels are not built on {platform.system()}')
    home = os.environ.get('XDG_CACHE_HOME') or ''
    # the standard has relative paths ignored
    base = Path(home) if os.path.isabs(home) else Path.home() / '.cache'
    folder = base / 'fasterai' / 'kernels'
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = folder.resolve()
    for place in (folder, *folder.parents): _check_owned(place, own=place == folder)
    return folder


def _check_owned(place, own):
    "Refuse a folder that others can write to, or in which they can put another in its place."
    status = place.stat()
    owners = {os.geteuid()} if own else {os.geteuid(), 0}
    if status.st_uid not in owners: raise Unavailable(f'{place} belongs to another user')
    if own and status.st_mode & 0o077: raise Unavailable(f'{place} is open to other users, expected mode 700')
    others = status.st_mode & stat.S_IWOTH
    group = status.st_mode & stat.S_IWGRP and status.st_gid not in (0, os.getegid())
    # in a sticky folder, such as /tmp, nobody can replace what belongs to another
    if (others or group) and not status.st_mode & stat.S_ISVTX:
        raise Unavailable(f'{place} can be written by other users')


@contextmanager
def _locked(path):
    import fcntl  # not there on Windows
    with open(path, 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield


def _digest_of(library): return library.with_suffix('.sha256')


def _is_whole(library):
    "Tell whether a library is as it was written."
    try: return hashlib.sha256(library.read_bytes()).hexdigest() == _digest_of(library).read_text()
    except (OSError, UnicodeDecodeError): return False


def _compile(source, compiler, flags, library):
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        new = Path(folder) / 'new.so'
        compile_with(compiler, [(*native, *flags) for native in NATIVE], source, new)
        digest = Path(folder) / 'digest'
        digest.write_text(hashlib.sha256(new.read_bytes()).hexdigest())
        os.replace(new, library)
        os.replace(digest, _digest_of(library))  # last: a library without it is built again


def compile_with(
    compiler: list,  # command, as words
    flags: list,  # of tuples of words; the first that the compiler takes counts
    source: Path,  # a file of C
    library: Path,  # is written
):
    "Compile a source into a shared library; `Unavailable` says what the compiler says."
    for these in flags:
        done = _call([*compiler, *these, str(source), '-o', str(library)])
        if not done.returncode: return
    raise Unavailable(f'{compiler[0]} failed: {_first_line(done.stderr)}')
