"""Map the repository's top-level folders into the `octavo` namespace."""

from setuptools import find_packages, setup

FOLDERS = ("pallas_kernels", "engine", "backends", "models", "server", "bench")

package_dir = {"octavo": "octavo"} | {f"octavo.{f}": f for f in FOLDERS}
packages = ["octavo", "octavo.cli"]
for folder in FOLDERS:
    packages += [f"octavo.{folder}"]
    packages += [f"octavo.{folder}.{sub}" for sub in find_packages(folder)]

setup(packages=packages, package_dir=package_dir)
