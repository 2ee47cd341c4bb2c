"use strict";
// Works the controls of docs/latents.html, and notes in `seen` what it saw. test_page.py puts this script at the end of
// a copy of the page, whose beginning then has `seen`, and `inputs`: codes and images in base64.

const bytes = base64 => Uint8Array.from(atob(base64), letter => letter.charCodeAt(0));
const base64 = array => btoa(Array.from(array, byte => String.fromCharCode(byte)).join(""));
const greys = x => x.map(value => Math.round(255 * value));
const parts = (array, size) =>
  Array.from({length: array.length / size}, (_, n) => array.slice(size * n, size * (n + 1)));
const all = arrays => arrays.flatMap(array => Array.from(array));

const near = (a, b, limit = 1e-9) => a.length === b.length && a.every((value, i) => Math.abs(value - b[i]) <= limit);
const one = (d, value) => z.map((other, i) => i === d ? value : other);
const picture = (id, column = 0) => {  // the grey levels of a canvas, of which each pixel is grey and opaque
  const {data} = element(id).getContext("2d").getImageData(28 * column, 0, 28, 28);
  const grey = Array.from({length: 784}, (_, i) => data[4 * i]);
  const right = grey.every((value, i) => [1, 2].every(c => data[4 * i + c] === value) && data[4 * i + 3] === 255);
  return right ? grey : [];
};
const at_z = () => near(picture("decoded"), greys(generate(z))) &&
  order.every(d => Math.abs(rows[d].slider.value - Math.max(-3.3, Math.min(3.3, z[d]))) < 0.026 &&
    Math.abs(rows[d].value.textContent.replace("\u2212", "-") - z[d]) < 0.00501);
const plane_url = () => plane.toDataURL();
const fire = (target, kind) => target.dispatchEvent(new Event(kind, {bubbles: true}));
const slide = (slider, value) => { slider.value = value; fire(slider, "input"); };
const point = (kind, across, up, buttons) => {  // in the plane, by its coordinates
  const box = plane.getBoundingClientRect(), width = plane.clientWidth;
  const clientX = box.left + plane.clientLeft + (across / EDGE + 1) / 2 * width;
  const clientY = box.top + plane.clientTop + (1 - up / EDGE) / 2 * width;
  plane.dispatchEvent(new PointerEvent(kind, {clientX, clientY, buttons, bubbles: true}));
};
const press = key => plane.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));

function model() {  // what NumPy is compared with
  const of_codes = parts(new Float32Array(bytes(inputs.codes).buffer), D);
  const of_images = parts(bytes(inputs.images), 784).map(x => encode(Float32Array.from(x, grey => grey / 255)));
  seen.decoded = base64(all(of_codes.map(code => greys(generate(code)))));
  seen.mu = all(of_images.map(code => code.mu));
  seen.log_var = all(of_images.map(code => code.log_var));
  seen.restored = base64(all(of_images.map(code => greys(generate(code.mu)))));
}

const controls = {
  "log_var is cut off above": () => {
    const most = data.max_log_var;
    data.max_log_var = -4;
    const {log_var} = encode(images[0]);
    data.max_log_var = most;
    return Math.max(...log_var) === -4;
  },

  "at first the garment is decoded from the mean of the first test image": () =>
    near(z, encode(images[0]).mu) && at_z(),

  "each slider moves its own number, the garment and the plane": () => order.every(d => {
    element("zero").click();
    [element("across").value, element("up").value] = [d, order[d === order[0] ? 1 : 0]];
    fire(element("across"), "change");
    const expected = one(d, 1.5), before = [picture("decoded"), plane_url()];
    slide(rows[d].slider, 1.5);
    const moved = Math.max(...picture("decoded").map((grey, i) => Math.abs(grey - before[0][i])));
    (seen.moved ??= {})[d] = moved;
    return near(z, expected) && at_z() && plane_url() !== before[1];
  }),

  "sliders are in the order of KL, and the KL stands beside each": () => {
    const shown = Array.from(document.querySelectorAll("#sliders label .kl"), kl => Number(kl.textContent));
    return shown.length === D && shown.every((kl, n) => Math.abs(kl - data.kl[order[n]]) < 0.0051) &&
      shown.every((kl, n) => kl <= (shown[n - 1] ?? Infinity)) &&
      order.every(d => rows[d].slider.ariaLabel === `dimension ${d}, KL ${data.kl[d].toFixed(2)} nats`);
  },

  "draw from the prior: another code each time": () => {
    element("prior").click();
    const first = z, right = at_z();
    element("prior").click();
    return right && at_z() && first.every((value, d) => value !== z[d]);
  },

  "z = 0": () => { element("zero").click(); return near(z, Array(D).fill(0)) && at_z(); },

  "a test image is shown and encoded, and the garment decoded from its mean": () => images.every((x, n) => {
    element("tests").children[n].click();
    const pressed = Array.from(element("tests").children, button => button.getAttribute("aria-pressed") === "true");
    const named = element("original-caption").textContent.endsWith(class_of(n));
    return near(z, encode(x).mu) && at_z() && near(picture("original"), greys(x)) && named &&
      pressed.every((is, other) => is === (other === n));
  }),

  "draw from q(z | x): mu + sigma eps": () => {
    element("tests").children[3].click();
    const random = Math.random, {mu, log_var} = encode(images[3]);
    Math.random = () => 0.25;  // eps = sqrt(2 log(4 / 3)) cos(pi / 2)
    element("posterior").click();
    const none = near(z, mu);
    Math.random = () => 0.5;  // eps = -sqrt(2 log 2)
    element("posterior").click();
    Math.random = random;
    return none && at_z() && near(z, mu.map((mean, d) => mean - Math.sqrt(2 * Math.log(2) * Math.exp(log_var[d]))));
  },

  "the walk goes from one mean to the other, and the strip shows it": () => {
    element("tests").children[4].click();
    element("tests").children[17].click();
    const start = encode(images[4]).mu, end = encode(images[17]).mu;
    const between = w => start.map((value, d) => value + w * (end[d] - value));
    const ends = near(picture("from"), greys(images[4])) && near(picture("to"), greys(images[17]));
    const strip = [0, 3, 9].every(n => near(picture("strip", n), greys(generate(between(n / 9))), 1));
    return ends && strip && [0, 0.25, 1].every(w => {
      slide(element("walk"), w);
      return near(z, between(w)) && at_z();
    });
  },

  "the plane's two dimensions can be chosen, and change places": () => {
    const choose_axis = (id, d) => { element(id).value = d; fire(element(id), "change"); return axes.join(); };
    const [a, b, c] = order;
    choose_axis("across", c);
    choose_axis("up", b);
    return choose_axis("across", a) === [a, b].join() && choose_axis("up", a) === [b, a].join() &&
      element("across").value === String(b) && choose_axis("across", a) === [a, b].join();
  },

  "dragging in the plane moves its two numbers, and only with a finger or button down": () => {
    const others = order.slice(2), before = z, [a, b] = axes;
    point("pointerdown", 1, -2, 1);
    const down = near([z[a], z[b]], [1, -2], 0.02) && at_z();
    point("pointermove", -0.5, 0.5, 1);
    const moved = near([z[a], z[b]], [-0.5, 0.5], 0.02) && at_z();
    point("pointermove", 2, 2, 0);
    const stays = near([z[a], z[b]], [-0.5, 0.5], 0.02);
    point("pointerdown", -3.32, 3.32, 1);
    return down && moved && stays && near([z[a], z[b]], [-3.3, 3.3]) && others.every(d => z[d] === before[d]);
  },

  "arrow keys move the same two numbers, other keys nothing": () => {
    element("zero").click();
    const [a, b] = axes;
    ["ArrowRight", "ArrowRight", "ArrowUp", "x", "ArrowDown", "ArrowDown", "ArrowLeft"].forEach(press);
    return near([z[a], z[b]], [0.1, -0.1]) && at_z();
  },

  "decoded images: ten times ten, as plot_latents has them": () => {
    const before = plane_url();
    element("mosaic").click();
    const whole = mosaic.canvas.getContext("2d");
    const right = [[0, 0], [9, 2], [4, 9]].every(([column, row]) => {
      const values = one(axes[0], -3 + 2 / 3 * column);
      values[axes[1]] = 3 - 2 / 3 * row;
      const shown = whole.getImageData(28 * column, 28 * row, 28, 28).data;
      return greys(generate(values)).every((grey, i) => Math.abs(grey - shown[4 * i]) <= 1);
    });
    const images = plane_url();
    slide(rows[order[2]].slider, 2);
    const follows = plane_url() !== images;
    element("zero").click();
    element("mosaic").click();
    [axes[0], axes[1]].forEach((d, n) => move({[d]: n ? -0.1 : 0.1}));
    return right && images !== before && follows && plane_url() === before;
  },

  "some classes among the codes, and all again": () => {
    const before = plane_url(), buttons = [...element("classes").children];
    const pictures = buttons.map(button => { button.click(); return plane_url(); });
    const pressed = () => buttons.filter(button => button.getAttribute("aria-pressed") === "true").length;
    const all = pressed();
    const fewer = buttons.map(button => { button.click(); return plane_url(); });
    return all === 10 && new Set([before, ...pictures, ...fewer.slice(0, -1)]).size === 20 && pressed() === 0 &&
      fewer.at(-1) === before;
  },

  "the test image is dim where the code is not of it": () => {
    const dim = () => Number(element("original").style.opacity) < 1;
    choose(3);
    const found = [dim()];
    for (const id of ["prior", "posterior", "zero"]) { element(id).click(); found.push(dim()); }
    return found.join() === "false,true,false,true";
  },

  "everything has a name for a screen reader, and can be reached by keyboard": () =>
    [...document.querySelectorAll("main button, main input, main select, main canvas")].every(one => {
      if (one.parentElement.matches("button")) return true;  // whose name is the button's
      const by = one.getAttribute("aria-labelledby");
      const text = one.labels?.[0]?.textContent || one.textContent;
      const said = one.getAttribute("aria-label") ?? (by ? element(by).textContent : text);
      return said.trim() !== "" && (one.matches("canvas[role=img]") || one.tabIndex === 0);
    }),
};

model();
seen.controls = Object.fromEntries(Object.entries(controls).map(([what, check]) => {
  try { return [what, check()]; } catch (error) { return [what, String(error.stack)]; }
}));

// The same page at several widths: nothing goes beyond its edge.
seen.overhang = {};
for (const width of [1280, 1000, 700, 390, 320]) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width: ${width}px; height: 844px; border: 0`;
  frame.srcdoc = inputs.template.replace("DATA", () => element("data").textContent);
  frame.onload = () => {
    const root = frame.contentDocument.documentElement;
    const garment = root.querySelector("#decoded").getBoundingClientRect();
    seen.overhang[width] = [root.scrollWidth - root.clientWidth, Math.round(garment.width)];
  };
  document.body.append(frame);
}
