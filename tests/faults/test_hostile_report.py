"""Every text that a run can hold, hostile, in the page of the run: in a real browser."""

import json

import pytest
import yaml
from browser import Browser, find_browser
from made_up_run import made_up, write_lines

from fastgrpo.report import write_report

RUNS = "document.title = 'owned'"
HOSTILE = (
    f"</script><script>{RUNS}</script>",
    f"<!--<script>{RUNS}</script>",
    f"<img src=x onerror=\"{RUNS}\"><svg onload=\"{RUNS}\">",
    f"\" onmouseover=\"{RUNS}\" autofocus onfocus=\"{RUNS}\" x=\"",
    f"' onclick='{RUNS}' '",
    f"<a href=\"javascript:{RUNS}\">press</a>[press](javascript:{RUNS})",
    f"\u2028;{RUNS};\u2029//",
    f"]]></style></title></textarea><iframe srcdoc=\"<script>parent.{RUNS}</script>\"></iframe>",
    f"{{{{ {RUNS} }}}}{{% raw %}}${{{RUNS}}}",
    "<meta http-equiv=refresh content=\"0;url=https://example.com\"><base href=//example.com>",
    "<link rel=stylesheet href=//example.com/x.css><style>@import '//example.com'</style>",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.fault(
    "prompts, completions, metrics, rewards, warnings, options and the run's name in HTML, with "
    "scripts, handlers, links and ends of what surrounds them",
    "the page shows them as text: nothing runs, and nothing is asked of the network",
)
@pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome on the path")
def test_the_page_runs_nothing_of_a_run(tmp_path):
    run = made_up(tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config |= {"run_name": "".join(HOSTILE), "reward_funcs": list(HOSTILE)}
    config |= {text: text for text in HOSTILE}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    named = {f"{kind}{text}{end}": 1.0 for text in HOSTILE for kind, end in
             (("", ""), ("rewards/", "/mean"), ("eval_", ""))}  # fmt: skip
    write_lines(run / "metrics.jsonl", [step | named for step in steps])
    rewards = dict.fromkeys(HOSTILE, 1.0)
    write_lines(run / "rewards.jsonl", [{"step": 1, "rewards": {t: [1.0] for t in HOSTILE}}])
    lines = [
        {
            "step": 1,
            "prompt": [{"role": text, "content": text}],
            "completion": text,
            "rewards": rewards,
            "advantage": 0.5,
            "extra": {text: text},
        }
        for text in HOSTILE
    ]
    write_lines(run / "completions.jsonl", lines)
    write_lines(run / "warnings.jsonl", [{"step": 1, "text": text} for text in HOSTILE])
    page = write_report(run)
    browser = Browser(tmp_path / "profile")
    try:
        browser.size(1440)
        browser.open(page)
        shown = browser.value("[...document.querySelectorAll('.card pre')].map(p => p.textContent)")
        for text in HOSTILE:  # prompt, completion and what was logged beside it
            assert shown.count(text) == 3
        # All that could be pressed, pointed at or focused.
        browser.value(
            "document.querySelectorAll('main *').forEach((e) => { e.focus?.(); e.click?.();"
            "e.dispatchEvent(new MouseEvent('mouseover', {bubbles: true})); })"
        )
        assert browser.value("document.title") != "owned"
        foreign = "main img, svg[onload], iframe, base, meta[http-equiv=refresh], link, main a"
        assert browser.value(f"document.querySelectorAll('{foreign}').length") == 0
        handlers = "[...document.querySelectorAll('*')].flatMap((e) => [...e.attributes])"
        assert browser.value(f"{handlers}.filter((a) => a.name.startsWith('on')).length") == 0
        asked = [r["request"]["url"] for r in browser.told("Network.requestWillBeSent")]
        assert len(asked) == 1 and asked[0].startswith("file://")
        for event in ("Runtime.exceptionThrown", "Log.entryAdded"):
            assert browser.told(event) == []
    finally:
        browser.close()
