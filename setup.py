"Reads settings.ini; everything that describes the package is there."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

here = Path(__file__).parent
config = ConfigParser()
config.read(here / 'settings.ini', encoding='utf-8')
about = config['DEFAULT']
version = re.search(r"__version__ = '(.+)'", (here / 'fasterai/__init__.py').read_text(encoding='utf-8'))[1]


class Wheel(bdist_wheel):
    "Make a wheel for one kind of machine where compiled code is taken along, for all Pythons."

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = not any((here / 'fasterai/native/libraries').glob('*.so'))

    def get_tag(self):
        python, abi, machine = super().get_tag()
        return ('py3', 'none', machine) if not self.root_is_pure else (python, abi, machine)


setup(
    name=about['lib_name'],
    version=version,
    description=about['description'],
    long_description=(here / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    keywords=about['keywords'].split(),
    author=about['author'],
    license=about['license'],
    license_files=['LICENSE'],
    packages=['fasterai', 'fasterai.deploy', 'fasterai.deploy.kernels', 'fasterai.native'],
    package_data={'fasterai': ['py.typed'], 'fasterai.deploy.kernels': ['sparse.c'],
                  'fasterai.native': ['sweep.c', 'libraries/*.so']},
    cmdclass={'bdist_wheel': Wheel},
    python_requires='>=' + about['min_python'],
    install_requires=about['requirements'].split(),
    extras_require={'deploy': about['deploy_requirements'].split(),
                    'science': about['science_requirements'].split(),
                    'examples': about['examples_requirements'].split(),
                    'zoo': (about['deploy_requirements'] + ' ' + about['zoo_requirements']).split(),
                    'dev': (about['deploy_requirements'] + ' ' + about['dev_requirements']).split()},
    classifiers=['Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
)
