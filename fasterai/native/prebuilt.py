"""Find code that came with the wheel, compiled, for machines without a compiler; and compile it for a wheel.

`python -m fasterai.native.prebuilt` writes it into `fasterai/native/libraries`. A wheel that is built after
that takes it along, and is one for machines of this kind."""
import hashlib
import platform
from pathlib import Path

from fasterai.native.build import FLAGS, compile_with, compiler_command, processor_flags

FOLDER = Path(__file__).parent / 'libraries'
SOURCES = Path(__file__).parent / 'sweep.c', Path(__file__).parents[1] / 'deploy/kernels/sparse.c'
# kind of machine: {what compilers call a class of processors: what /proc/cpuinfo says of each of them}; the
# best comes first
CLASSES = {
    'x86_64': {'x86-64-v4': {'avx512f', 'avx512bw', 'avx512cd', 'avx512dq', 'avx512vl'},
               'x86-64-v3': {'avx2', 'bmi1', 'bmi2', 'f16c', 'fma', 'abm', 'movbe'}},
    'aarch64': {'armv8-a': {'asimd'}},
}
MORE_FLAGS = {'x86-64-v4': ('-mprefer-vector-width=512',)}
OF_VARIANTS = {'native': ('x86-64-v4', 'x86-64-v3', 'armv8-a'), 'avx2': ('x86-64-v3',), 'plain': ()}


def prebuilt(
    source: Path,  # a file of C
    variant: str = 'native',  # a key of `build.VARIANTS`
) -> Path | None:  # a shared library; None where there is none that this processor can run
    "Return the compiled source that came with the package."
    has = processor_flags()
    for name, needs in CLASSES.get(platform.machine(), {}).items():
        path = _path(source, name)
        if name in OF_VARIANTS[variant] and needs <= has and path.is_file(): return path
    return None


def _path(source, name):
    "Return where a library lies; one of another source is not found there."
    digest = hashlib.sha256(source.read_bytes() + ' '.join(FLAGS).encode()).hexdigest()[:16]
    return FOLDER / f'{source.stem}-{name}-{digest}.so'


def compile_all() -> list:  # of the paths
    "Compile each source for each class of processors of this machine's kind; `Unavailable` where that fails."
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob('*.so'): old.unlink()
    written = []
    for source in SOURCES:
        for name in CLASSES.get(platform.machine(), {}):
            path, flags = _path(source, name), (f'-march={name}', *MORE_FLAGS.get(name, ()), *FLAGS)
            compile_with(compiler_command(), [flags], source, path)
            written.append(path)
    return written


if __name__ == '__main__':
    for path in compile_all(): print(path)
