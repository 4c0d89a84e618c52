import pytest

from tests import originals


@pytest.mark.parametrize("version", originals.PACKAGES)
def test_each_version_has_a_process_with_its_own_package(version):
    folder = originals.FOLDER / version
    assert originals.run(version, "path").startswith(str(folder))
