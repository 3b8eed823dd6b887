#!/usr/bin/env python3
"""The web page of a real target in a real Chromium.

    page.py CRYPTFOLD CRYPTFOLD_PERF SCREENSHOTS [--keep-images DIR]

One PASS or FAIL line per part; the first FAIL ends the run. Screenshots go to SCREENSHOTS. --keep-images also writes the
two pictures of the README there.
"""

import os
import shutil
import signal
import sys
import tempfile

from selenium.webdriver.common.keys import Keys

from browser import CONTRAST, OVERFLOW, Browser, contrast
from target import HOST, HOSTILE_HOST, HOSTILE_VOLUME, NQN, Failure, Load, Target, set_up, wait, wait_equal

TOKEN = "correct horse"
UNITS = ["B", "KiB", "MiB", "GiB", "TiB"]


def shown(n):
    """Bytes as the command line shows them."""
    unit = 0
    while n >= 999.5 and unit < len(UNITS) - 1:
        n, unit = n / 1024, unit + 1
    digits = 0 if unit == 0 or n >= 99.95 else 1 if n >= 9.995 else 2
    return f"{n:.{digits}f} {UNITS[unit]}"


def equal(what, got, want):
    if got != want:
        raise Failure(f"{what}: expected {want!r}, got {got!r}")


def live(page):
    return page.attribute("#live", "data-live") == "yes"


def rows(page, table):
    """Cells of a table's rows by their heads, after "show all"."""
    return page.script("""
        const root = document.querySelector(arguments[0]);
        const more = root.querySelector(".more");
        if (more.checkVisibility() && more.getAttribute("aria-expanded") === "false") more.click();
        const heads = [...root.querySelectorAll("thead th")].map((e) => e.textContent);
        return [...root.querySelectorAll("tbody tr")].map((row) => Object.fromEntries([...row.cells].map((cell, n) => {
          const data = cell.querySelector("data"), name = cell.querySelector("b");
          return [heads[n], name ? name.textContent : data ? [data.textContent, data.getAttribute("value")] : cell.textContent];
        })));
    """, table)


def the_empty_page(page, target, _):
    """A target that has nothing says what to do next."""
    page.driver.get(target.url)
    wait("the page is live", lambda: live(page))
    equal("state", page.text("#state"), "Healthy")
    for element, command in [("#no-pool", "cryptfold pool create"), ("#no-volume", "cryptfold volume create"),
                             ("#no-host", "nvme connect")]:
        if not page.is_seen(element) or command not in page.text(element):
            raise Failure(f"{element} does not say '{command}': {page.text(element)!r}")
    equal("ratio", page.text("#ratio"), "–")


def values(page, target, load):
    """Space, ratio, volumes, hosts and reactors are what the RPC says."""
    load.start(HOST, 1, "--bs", "16k", "--dedupe-pct", "60", "--compress-ratio", "2.5", rw="randwrite", runtime=6)
    load.start(HOSTILE_HOST, 2, "--bs", "64k", "--dedupe-pct", "30", "--compress-ratio", "2", rw="write", runtime=6)
    for process in load.processes:
        equal("status of a host that wrote", process.wait(120), 0)
    load.stop()
    load.start(HOST, 1, "--bs", "4k", rw="randread")
    load.start(HOSTILE_HOST, 2, "--bs", "8k", rw="randread")

    def space():
        pool = target.pool()
        page_has = {name: page.value(f"#{name}") for name in ("logical", "size")}
        wanted = {"logical": pool["logical_bytes"], "size": pool["size_bytes"]}
        parts = {"stored": "stored_bytes", "metadata": "metadata_bytes", "free": "free_bytes"}
        for part, name in parts.items():
            page_has[part] = page.value(f'#size-parts li[data-key="{part}"] data')
            wanted[part] = pool[name]
        zero = '#logical-parts li[data-key="zero"] data'
        page_has["zero"], wanted["zero"] = page.value(zero), pool["zero_bytes"]
        page_has["text"], wanted["text"] = page.text("#logical"), shown(pool["logical_bytes"])
        page_has["ratio"], wanted["ratio"] = page.text("#ratio"), f"{pool['ratio'] or 0:.2f}"
        return page_has, wanted

    wait_equal("the page's space is the RPC's", space)
    if page.value("#logical") == 0 or page.value("#ratio") <= 1:
        raise Failure("what was written to compare with did not come to be reduced")

    def volumes():
        columns = [("Size", "size_bytes"), ("Written", "logical_bytes"), ("Gives back", "reclaimable_bytes")]
        told = {v["name"]: {head: [shown(v[key]), str(v[key])] for head, key in columns}
                for v in target.call("bdev_lvol_get_lvols")}
        seen = {row["Name"]: {head: row[head] for head, _ in columns} for row in rows(page, "#volumes")}
        return seen, told

    wait_equal("the page's volumes are the RPC's", volumes)
    seen = {row["Name"]: row for row in rows(page, "#volumes")}
    equal("exported as", seen["database"]["Exported as"], f"{NQN}/1")
    equal("pools", page.texts("#pools h3"), ["tank"])

    def hosts():
        told = sorted(c["hostnqn"] for c in target.call("nvmf_subsystem_get_controllers", nqn=NQN))
        return sorted(row["Host"] for row in rows(page, "#hosts")), told

    wait_equal("the page's hosts are the RPC's", hosts)
    equal("hosts", {row["Host"] for row in rows(page, "#hosts")}, {HOST, HOSTILE_HOST})
    cores = [f"Core {r['lcore']}" for r in target.call("framework_get_reactors")["reactors"]]
    equal("reactors", page.texts("#reactors .name"), cores)


def live_updates(page, target, load):
    """Figures move, charts grow, what is made appears and what is deleted goes; without the page being loaded again."""
    page.script("window.mark = 1")
    wait("reads per second", lambda: (page.value("#iops .legend li:first-child data") or 0) > 0)
    for chart in ("throughput", "iops", "latency"):
        wait(f"a line in {chart}", lambda chart=chart: page.attribute(f"#{chart} .line.read", "d"))
    wait("operations in the heat map", lambda: "operations" in page.text("#heat .readout"))
    wait("a percentile", lambda: (page.value("#latency .legend li:nth-child(2) data") or 0) > 0)
    before = page.attribute("#iops .plot", "aria-valuetext")
    wait("the chart's text moves on", lambda: page.attribute("#iops .plot", "aria-valuetext") != before)
    wait("a volume's rate", lambda: next(r for r in rows(page, "#volumes") if r["Name"] == "database")["Read"][1] not in (None, "0"))
    target.call("bdev_lvol_create", lvs_name="tank", lvol_name="newcomer", size_in_mib=64)
    wait("a new volume appears", lambda: "newcomer" in [r["Name"] for r in rows(page, "#volumes")])
    target.call("bdev_lvol_delete", name="tank/newcomer")
    wait("a deleted volume goes", lambda: "newcomer" not in [r["Name"] for r in rows(page, "#volumes")])
    equal("the page was not loaded again", page.script("return window.mark"), 1)
    if not load.alive():
        raise Failure("a host has ended")


def hostile_names(page, _target, _load):
    """Names are text, whatever they hold."""
    names = [r["Name"] for r in rows(page, "#volumes")] + [r["Host"] for r in rows(page, "#hosts")]
    for name in (HOSTILE_VOLUME, HOSTILE_HOST):
        if name not in names:
            raise Failure(f"{name} is not shown as it is: {names}")
    foreign = page.script("return document.querySelectorAll('main script, main img, [onerror]').length")
    equal("elements that came from names", foreign, 0)
    if "owned" in page.driver.title:
        raise Failure("a name was executed")


def keyboard(page, _target, _load):
    """Everything can be reached and used without a pointer, and one sees where one is."""
    page.size(1440)
    page.script("window.scrollTo(0, 0); document.activeElement.blur()")
    page.keys(Keys.TAB)
    equal("first stop", page.focused("e.className"), "skip")
    wait("the skip link is seen", lambda: page.script("return document.querySelector('.skip').getBoundingClientRect().top >= 0"))
    page.keys(Keys.ENTER)
    equal("behind the skip link", page.focused("e.id"), "main")

    seen = []
    for _ in range(200):
        page.keys(Keys.TAB)
        what = page.focused("e === document.body ? null : (e.closest('[id]').id + ' ' + (e.textContent || e.name || e.className)).trim()")
        if what is None or what in seen:
            break
        # A radio button's ring is drawn around its label.
        ring = page.focused("(() => { const s = getComputedStyle(e.matches('.choice input') ? e.nextElementSibling : e);"
                            " return s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2 })()")
        if not ring:
            raise Failure(f"no ring around what has the focus: {what}")
        seen.append(what)
    for stop in ("range", "throughput", "latency-op", "heat", "volumes Name", "volumes Size", "hosts Host"):
        if not any(s.startswith(stop) for s in seen):
            raise Failure(f"{stop} can not be reached: {seen}")

    page.script("document.querySelectorAll('#volumes thead button')[1].focus()")
    page.keys(Keys.ENTER)
    equal("sorted by size", page.attribute("#volumes thead th:nth-child(2)", "aria-sort"), "descending")
    sizes = [float(row["Size"][1]) for row in rows(page, "#volumes")]
    equal("sizes", sizes, sorted(sizes, reverse=True))
    page.keys(Keys.SPACE)
    equal("sorted the other way", page.attribute("#volumes thead th:nth-child(2)", "aria-sort"), "ascending")
    sizes = [float(row["Size"][1]) for row in rows(page, "#volumes")]
    equal("sizes", sizes, sorted(sizes))

    page.script("document.querySelector('#volumes input').focus()")
    page.keys("vm-1")
    equal("filtered", {row["Name"] for row in rows(page, "#volumes")}, {"vm-1", "vm-10", "vm-11", "vm-12"})
    page.keys(*[Keys.BACKSPACE] * 4)

    plot = "#throughput .plot"
    page.script("document.querySelector(arguments[0]).focus({ focusVisible: true })", plot)
    page.keys(Keys.END)
    newest = page.attribute(plot, "aria-valuetext")
    page.keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    older = page.attribute(plot, "aria-valuetext")
    if older == newest or "Read" not in older or "Write" not in older:
        raise Failure(f"arrow keys do not read the chart: {newest!r}, then {older!r}")
    # The others show the same moment.
    equal("the moment in the other chart", page.text("#iops .when"), older[:8])
    page.keys(Keys.ESCAPE)

    page.script("document.querySelector('#range input').focus()")
    page.keys(Keys.ARROW_RIGHT)
    equal("range", page.attribute("#iops .plot", "aria-label"), "Operations per second, last hour")
    page.keys(Keys.ARROW_LEFT)


def themes_and_widths(page, pictures):
    """Contrast in both themes, nothing cut off or sticking out at 400 pixels."""
    for theme in ("light", "dark"):
        page.media(prefers_color_scheme=theme)
        for width in (1440, 400):
            page.size(width)
            page.script("window.scrollTo(0, 0); document.activeElement.blur()")
            page.settle(width)
            wait("the page is live", lambda: live(page))
            texts = page.script(CONTRAST)
            if len(texts) < 40:
                raise Failure(f"only {len(texts)} texts are seen")
            weak = [(text, round(contrast(a, b), 2)) for text, a, b in texts if contrast(a, b) < 4.5]
            equal(f"texts of too little contrast, {theme}, {width} pixels", weak, [])
            scroll, window, out = page.script(OVERFLOW)
            equal(f"what sticks out at {width} pixels", (scroll, out), (window, []))
            page.screenshot(f"{pictures}/{theme}-{width}.png")
    equal("the theme was the system's", page.text("#theme-name"), "System")


def theme_is_remembered(page, target):
    page.size(1440)
    page.media(prefers_color_scheme="light")
    ground = "return getComputedStyle(document.documentElement).backgroundColor"
    light = page.script(ground)
    page.script("document.querySelector('#theme').focus()")
    page.keys(Keys.ENTER, Keys.ENTER)
    equal("theme", page.text("#theme-name"), "Dark")
    dark = page.script(ground)
    if light == dark:
        raise Failure("dark looks like light")
    page.driver.get(target.url)
    equal("theme, remembered", (page.text("#theme-name"), page.script(ground)), ("Dark", dark))
    page.script("document.querySelector('#theme').click()")
    equal("theme, the system's again", page.script(ground), light)
    wait("the page is live", lambda: live(page))


def looks(page, target, _load):
    themes_and_widths(page, page.pictures)
    theme_is_remembered(page, target)
    page.media(prefers_reduced_motion="reduce")
    moving = page.script("return [...document.querySelectorAll('*')].filter((e) => !/^0s(, 0s)*$/.test("
                         "getComputedStyle(e).transitionDuration) || getComputedStyle(e).animationName !== 'none').length")
    equal("elements that move though motion is not wanted", moving, 0)
    page.media(prefers_color_scheme="light")


def nothing_else_is_asked(page, target, _load):
    """No complaint on the console, no request to anybody else; content security holds."""
    equal("complaints", page.complaints(), [])
    asked = page.asked()
    foreign = [url for url in asked if not url.startswith((target.url + "/", page.first_url + "/"))]
    equal("requests to elsewhere", foreign, [])
    for path in ("/api/v1/stream", "/api/v1/history", "/style.css"):
        if target.url + path not in asked:
            raise Failure(f"{path} was not asked for: {asked}")
    page.script("const s = document.createElement('script'); s.textContent = 'window.inline = 1'; document.body.append(s)")
    equal("an inline script", page.script("return window.inline ?? null"), None)
    page.complaints()


def lost_and_found(page, target, load):
    """A target that dies is seen to be gone, what is left is marked as old, and it is back when it is back."""
    config = f"{target.directory}/saved.json"
    target.call("save_config", filename=config)
    logical = target.pool()["logical_bytes"]
    load.stop()
    target.kill()
    wait("the page sees that the target is gone", lambda: not live(page) and page.is_seen("#stale"))
    wait("old figures are marked", lambda: page.script("return document.body.classList.contains('is-stale')"))
    equal("state", (page.text("#live-text"), page.text("#state")), ("Disconnected", "Unknown"))
    if "how it was at" not in page.text("#stale"):
        raise Failure(f"the banner does not say from when the figures are: {page.text('#stale')!r}")
    weak = [text for text, a, b in page.script(CONTRAST) if contrast(a, b) < 4.5]
    equal("texts of too little contrast while old", weak, [])
    page.screenshot(f"{page.pictures}/lost.png", whole=False)
    target.start("-c", config)
    wait("the page is live again", lambda: live(page) and not page.is_seen("#stale"))
    wait("with the same data", lambda: page.value("#logical") == logical)
    page.complaints()


def tabs(page, target, _load):
    """A browser has six connections to a target: a tab that nobody looks at holds none, so one more than six are served."""
    first = page.driver.current_window_handle
    others = []
    for number in range(2, 9):
        page.driver.switch_to.new_window("tab")
        others.append(page.driver.current_window_handle)
        page.driver.get(target.url)
        wait(f"tab {number} is live", lambda: live(page))
    for handle in others:
        page.driver.switch_to.window(handle)
        page.driver.close()
    page.driver.switch_to.window(first)
    wait("the first tab is live again", lambda: live(page) and page.text("#live-text") == "Live")
    equal("state", page.text("#state"), "Healthy")
    page.complaints()


def token(page, target, _load):
    """Where a token is needed it is asked for, kept for the tab, and sent with requests only."""
    page.driver.get(target.url)
    wait("the token is asked for", lambda: page.is_seen("#token"))
    equal("volumes before the token", page.texts("#volumes tbody tr"), [])
    page.keys("wrong", Keys.ENTER)
    wait("a wrong token is told", lambda: page.is_seen("#token-wrong"))
    weak = [(text, round(contrast(a, b), 2)) for text, a, b in page.script(CONTRAST) if contrast(a, b) < 4.5]
    equal("texts of too little contrast", weak, [])
    page.screenshot(f"{page.pictures}/token.png", whole=False)
    page.driver.get(target.url)
    wait("it is asked for again", lambda: page.is_seen("#token"))
    equal("told as wrong before it is given", page.is_seen("#token-wrong"), False)
    # Nothing that a header could carry.
    page.keys(f"\u201c{TOKEN}\u201d", Keys.ENTER)
    wait("typographic quotes are told as wrong", lambda: page.is_seen("#token-wrong"))
    equal("the dialog, and what it holds", page.script("const d = document.querySelector('#token');"
                                                      " return [d.open, d.querySelector('input').value]"), [True, ""])
    equal("kept though it is wrong", page.script("return sessionStorage.length"), 0)
    page.keys(TOKEN, Keys.ENTER)
    wait("the page is live", lambda: live(page))
    equal("the dialog is gone", page.is_seen("#token"), False)
    page.driver.get(target.url)
    wait("the page is live without being asked again", lambda: live(page))
    if any("correct" in url or "horse" in url for url in page.asked()):
        raise Failure("the token is in an address")
    equal("kept beyond the tab", page.script("return JSON.stringify(localStorage).includes('horse')"), False)


def pictures_for_the_readme(page, target, load, directory):
    """Five minutes of hosts at work, so that there is something to see."""
    for number, nsid in [(1, 1), (2, 2), (3, 1)]:
        load.start(f"{HOST}-{number}", nsid, "--bs", "16k", "--dedupe-pct", "50", "--compress-ratio", "2.5")
    os.makedirs(directory, exist_ok=True)
    page.driver.get(target.url)
    wait("the page is live", lambda: live(page))
    for points in range(30, 300, 30):
        if points == 120:
            load.start(f"{HOST}-4", 2, "--bs", "64k", "--dedupe-pct", "50", "--compress-ratio", "2.5", rw="randread", runtime=60)
        wait("another half minute", lambda points=points: float(page.attribute("#iops .plot", "aria-valuemax")) > points)
    for theme, width, height in [("dark", 1440, 1010), ("light", 400, 860)]:
        page.media(prefers_color_scheme=theme)
        page.size(width, height)
        page.script("window.scrollTo(0, 0); document.activeElement.blur()")
        page.screenshot(f"{directory}/page-{width}.png", whole=False)


def main():
    program, perf, pictures = sys.argv[1:4]
    images = sys.argv[5] if sys.argv[4:5] == ["--keep-images"] else None
    directory = tempfile.mkdtemp(prefix="cryptfold-page.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with open(f"{directory}/token", "w") as file:
        file.write(TOKEN + "\n")
    target = Target(program, directory, "target")
    guarded = Target(program, directory, "guarded", "--http-token", f"{directory}/token")
    load, page, part = Load(perf, 0, directory), None, "start"
    try:
        target.start()
        guarded.start()
        page = Browser()
        page.pictures, page.first_url = pictures, target.url
        page.size(1440)
        page.media(prefers_color_scheme="light")
        parts = [the_empty_page, values, live_updates, hostile_names, keyboard, looks, nothing_else_is_asked, lost_and_found, tabs]
        for check in [*parts, token]:
            part = check.__name__.replace("_", " ")
            if check is values:
                load.port = set_up(target)
            check(page, guarded if check is token else target, load)
            print(f"PASS {part}", flush=True)
        if images:
            pictures_for_the_readme(page, target, load, images)
            load.stop()
        target.stop()
        guarded.stop()
    except Exception as error:  # Selenium's too: the part's name and the target's log say more than a trace
        print(f"FAIL {part}: {type(error).__name__}: {error}")
        if page:
            try:
                page.screenshot(f"{pictures}/failed.png")
                print(f"--- console: {page.complaints()}")
            except Exception as gone:  # the browser itself may be what failed
                print(f"--- the browser does not answer: {type(gone).__name__}: {gone}")
        for log in (target.log, f"{directory}/load-1.log"):
            if os.path.exists(log):
                with open(log) as file:
                    print(f"--- end of {os.path.basename(log)}\n{file.read()[-3000:]}")
        sys.exit(1)
    finally:
        load.stop()
        target.kill()
        guarded.kill()
        try:
            if page:
                page.close()
        finally:
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
