"""The report of `pysteer doctor`."""

from commands import check_mistake, strict_json


def test_doctor_writes_a_report_without_paths(cli, tiny_llama, tmp_path):
    report = tmp_path / "report.json"
    for _ in range(2):  # a report of pysteer's own is replaced
        code, out, err = cli("doctor", "-m", tiny_llama, "-t", "1", "--report", report)
        assert (code, err) == (0, "")
    text = report.read_text("utf-8")
    found = strict_json(text)
    assert found["format"] == "pysteer.doctor/1"
    assert found["ok"] is True
    assert {way["operator"] for way in found["ways"]} >= {"add", "ablate", "rotate", "low_rank"}
    assert all(way["ok"] and way["error"] < 1e-5 for way in found["ways"])
    assert [cost["steering"] for cost in found["costs"]] == ["none", "add", "ablate"]
    assert found["hardware"][0].startswith("CPU: CPU, ")
    assert tiny_llama.name not in text
    assert str(tmp_path) not in text
    assert "control vector" in out


def test_doctor_refuses_a_report_over_another_file_before_any_check(cli, tiny_llama, tmp_path):
    other = tmp_path / "notes.json"
    other.write_text("{}")
    check_mistake(cli("doctor", "-m", tiny_llama, "--report", other), other)
    assert other.read_text() == "{}"
