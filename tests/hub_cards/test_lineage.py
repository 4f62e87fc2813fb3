import pytest

from hub_cards import model_license


def origin(name, license, role="initial weights"):
    return {"name": name, "role": role, "license": license}


@pytest.mark.parametrize(
    ("origins", "expected"),
    [
        ([], "apache-2.0"),
        ([origin("Qwen/Qwen2.5-0.5B", "apache-2.0"), origin("own teacher", "mit", "teacher")], "apache-2.0"),
        ([origin("nvidia/4D-RGPT-8B", "CC-BY-NC-4.0")], "cc-by-nc-4.0"),
        ([origin("x/L4P", "cc-by-nc-sa-4.0", "teacher"), origin("y/NVILA-8B", "cc-by-nc-4.0")], "cc-by-nc-sa-4.0"),
    ],
)
def test_strictest_license_wins(origins, expected):
    assert model_license(origins) == expected


def test_unknown_license_is_an_error_that_names_the_origin():
    with pytest.raises(ValueError, match="some/model: what follows from the license 'other'"):
        model_license([origin("some/model", "other")])


@pytest.mark.parametrize("name", ["Efficient-Large-Model/NVILA-Lite-8B", "nvidia/4D-RGPT-8B", "NVlabs/L4P"])
def test_non_commercial_family_cannot_be_called_permissive(name):
    with pytest.raises(ValueError, match="is non-commercial as published"):
        model_license([origin(name, "apache-2.0")])
