import pytest

import control
import spheres


@pytest.mark.parametrize("package", [control, spheres], ids=lambda package: package.__name__)
def test_public_names_are_there_and_no_others(package):
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = package.trian
