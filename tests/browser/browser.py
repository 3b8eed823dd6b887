"""A headless Chromium with a page in it, and what the tests ask it."""

import json
import re
import shutil
import tempfile

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

from target import wait

FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --force-color-profile=srgb
    --disable-default-apps --disable-extensions --no-default-browser-check""".split()

# Every text that is seen, with its colours: [text, foreground, background], each as [r, g, b].
CONTRAST = """
const canvas = document.createElement("canvas");
canvas.width = canvas.height = 1;
const context = canvas.getContext("2d", { willReadFrequently: true });
// As the browser would paint it: whatever notation a style has.
const paint = (colours, last, alpha) => {
  context.clearRect(0, 0, 1, 1);
  for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
  if (last) { context.globalAlpha = alpha; context.fillStyle = last; context.fillRect(0, 0, 1, 1); context.globalAlpha = 1; }
  return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const out = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
  if (text === "" || element.closest("script, style, noscript, .hidden, dialog:not([open])")) continue;
  if (!element.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true })) continue;
  const box = element.getBoundingClientRect();
  if (box.width < 2 || box.height < 2) continue;
  const grounds = [];
  let alpha = 1;
  for (let e = element; e; e = e.parentElement) {
    grounds.unshift(getComputedStyle(e).backgroundColor);
    alpha *= Number(getComputedStyle(e).opacity);
  }
  grounds.unshift("white");
  const style = getComputedStyle(element);
  const colour = element.namespaceURI.endsWith("svg") ? style.fill : style.color;
  out.push([text.slice(0, 40), paint(grounds, colour, alpha), paint(grounds)]);
}
return out;
"""

# What reaches beyond the window's right edge, unless it is cut off on purpose.
OVERFLOW = """
const width = document.documentElement.clientWidth, out = [];
for (const e of document.querySelectorAll("body *")) {
  const box = e.getBoundingClientRect();
  if (box.width > 1 && box.right > width + 1 && !e.closest(".hidden, svg") && e.checkVisibility()) out.push(e.outerHTML.slice(0, 120));
}
return [document.documentElement.scrollWidth, width, out];
"""


def luminance(rgb):
    channels = [c / 255 for c in rgb]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    """WCAG 2.2's contrast ratio."""
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


class Browser:
    """Closed by .close(); nothing of it stays."""

    def __init__(self):
        self.profile = tempfile.mkdtemp(prefix="cryptfold-chromium.")
        options = Options()
        options.binary_location = shutil.which("chromium")
        for flag in [*FLAGS, f"--user-data-dir={self.profile}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        try:
            self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        except BaseException:
            shutil.rmtree(self.profile, ignore_errors=True)
            raise
        self.driver.set_script_timeout(60)
        self.driver.set_page_load_timeout(120)
        self.requests = []

    def close(self):
        try:
            self.driver.quit()
        finally:
            shutil.rmtree(self.profile, ignore_errors=True)

    def size(self, width, height=1000):
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def settle(self, width):
        """Until the page has this width, and has been laid out and drawn in it: charts follow within a frame."""
        wait(f"the page is {width} pixels wide", lambda: self.script("return document.documentElement.clientWidth") == width)
        # What is asked for in one frame comes in the next, after the whole of the first.
        self.driver.execute_async_script(
            "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done()))")

    def media(self, **features):
        listed = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.cdp("Emulation.setEmulatedMedia", features=listed)

    def cdp(self, command, **params):
        return self.driver.execute_cdp_cmd(command, params)

    def script(self, text, *arguments):
        return self.driver.execute_script(text, *arguments)

    def one(self, css):
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def text(self, css):
        return self.script("return document.querySelector(arguments[0])?.textContent ?? null", css)

    def texts(self, css):
        return self.script("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", css)

    def value(self, css):
        """The raw figure of a <data>."""
        text = self.script("return document.querySelector(arguments[0])?.getAttribute('value') ?? null", css)
        return None if text is None else float(text)

    def attribute(self, css, name):
        return self.script("return document.querySelector(arguments[0])?.getAttribute(arguments[1]) ?? null", css, name)

    def is_seen(self, css):
        return self.script("return document.querySelector(arguments[0])?.checkVisibility() ?? false", css)

    def keys(self, *keys):
        chain = ActionChains(self.driver)
        for key in keys:
            chain.send_keys(key)
        chain.perform()

    def focused(self, expression):
        return self.script(f"const e = document.activeElement; return {expression}")

    def complaints(self):
        """Errors and warnings of the console since the last time."""
        return [e["message"] for e in self.driver.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]

    def asked(self):
        """Addresses of all requests of the page until now."""
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            elif message["method"] == "Network.webSocketCreated":
                self.requests.append(message["params"]["url"])
        return [url for url in self.requests if not re.match(r"(data|blob|about|chrome)[:-]", url)]

    def screenshot(self, path, whole=True):
        import base64

        picture = self.cdp("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        with open(path, "wb") as file:
            file.write(base64.b64decode(picture["data"]))
