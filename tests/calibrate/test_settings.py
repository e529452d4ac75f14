import pytest

from pysteer import SteeringError
from pysteer.calibrate.settings import CalibrateSettings
from pysteer.settings import content


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"methods": ("magic",)}, "unknown item of methods 'magic'.*learned"),
        ({"methods": ()}, "no methods"),
        ({"scopes": ("sometimes",)}, "sometimes"),
        ({"scopes": ()}, "no scopes"),
        ({"strengths": (2.0, 1.0)}, "strengths 2.0 to 1.0"),
        ({"strengths": (0.0, 1.0)}, "strengths must be above 0, not 0.0"),
        ({"strengths": (1.0, float("inf"))}, "strengths"),
        ({"held_out": "luck"}, "unknown held_out 'luck'.*prompts, subcategories"),
        ({"minutes": -1.0}, "minutes must be at least 0, not -1"),
        ({"minutes": float("nan")}, "minutes"),
        ({"category_steps": -1}, "category_steps"),
        ({"trials": 0}, "trials must be at least 1, not 0"),
        ({"max_degenerate": 1.5}, "max_degenerate"),
        ({"max_leak": 1.0}, "max_leak"),
        ({"max_look_alike": -0.1}, "max_look_alike"),
        ({"max_benign_change": -0.1}, "max_benign_change"),
        ({"validation": 0.5, "test": 0.5}, "leave too little"),
        ({"limit": 0}, "limit"),
        ({"others": -1}, "others"),
        ({"parallel": 0}, "parallel"),
        ({"seed": 2**32}, "seed"),
    ],
)
def test_invalid_setting_raises(wrong, said):
    with pytest.raises(SteeringError, match=said):
        CalibrateSettings(**wrong)


def test_settings_content_is_json_data():
    found = content(CalibrateSettings(layers=(1, 2)))
    assert found["layers"] == [1, 2]
    assert found["methods"] == ["learned"]
    assert found["strengths"] == [0.6, 1.6]
