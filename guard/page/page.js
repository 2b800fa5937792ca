const byId = (id) => document.getElementById(id);

const REASONS = {
  jacobian_norm: "The class probabilities change unusually steeply around this image, as they do where an image was pushed just across a border between classes.",
  radius: "The runner-up class is unusually close: a small change of the image could flip the answer.",
  margin_gradient: "The lead of the top class changes unusually steeply around this image.",
  min_radius: "The answer holds less far than this server demands.",
  not_finite: "The model's numbers for this image are not finite.",
};

const DETECTORS = {
  jacobian: "Jacobian norm",
  "jacobian-full": "Jacobian norm",
  radius: "inverse radius",
  combined: "Jacobian norm and radius",
  "margin-gradient": "margin gradient",
};

let model = null;
let latest = 0;
let pending = null;
let shown = null;

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function drawn(name, attributes = {}, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

function percent(share, digits = 1) {
  if (share > 0 && share < 0.001) return "< 0.1%";
  if (share < 1 && share > 0.999) return "> 99.9%";
  return `${(100 * share).toFixed(digits)}%`;
}

const short = (share) => `${Number((100 * share).toPrecision(2))}%`;
const digits = (value) => (value === 0 ? "0" : String(Number(value.toPrecision(3))));

async function problemOf(response) {
  try {
    const { error, request_id } = await response.json();
    return { code: error.code, message: error.message, request_id };
  } catch {
    return { code: `status ${response.status}`, message: "The server gave no reason.", request_id: null };
  }
}

async function connect() {
  try {
    const response = await fetch("model");
    if (response.ok) {
      model = await response.json();
      describe();
      listSamples();
      return;
    }
    const problem = await problemOf(response);
    byId("facts").textContent = problem.code === "not_ready" ? "loading the model…" : problem.message;
  } catch {
    byId("facts").textContent = "the server does not answer";
  }
  setTimeout(connect, 1500);
}

function describe() {
  const { manifest, calibration, provider } = model;
  const { height, width } = manifest.input;
  const facts = [
    model.name,
    `${manifest.class_names.length} classes`,
    `${height} × ${width} pixels`,
    `set to reject at most ${short(calibration.fpr)} of clean images`,
    provider === "cpu" ? "CPU" : provider.toUpperCase(),
  ];
  byId("facts").textContent = facts.join(" · ");
  const address = new URL("classify", document.baseURI).href;
  byId("curl").textContent = `curl -F image=@photo.jpg ${address}`;
  plot();
}

async function listSamples() {
  const response = await fetch("samples.json");
  const samples = response.ok ? await response.json() : [];
  const groups = [["clean", "Clean samples"], ["adversarial", "Attacked samples"]];
  for (const [kind, title] of groups) {
    const members = samples.filter((sample) => sample.kind === kind);
    if (!members.length) continue;
    const strip = element("div", { class: "strip" });
    for (const sample of members) {
      const picture = element("img", { src: sample.url, alt: "", loading: "lazy" });
      const button = element("button", { type: "button", title: sample.note, "aria-pressed": "false" }, picture);
      button.append(element("span", {}, sample.title));
      button.addEventListener("click", () => chooseSample(sample, button));
      strip.append(button);
    }
    byId("samples").append(element("h3", {}, title), strip);
  }
  byId("samples").hidden = !byId("samples").children.length;
}

async function chooseSample(sample, button) {
  const ticket = begin();
  try {
    const response = await fetch(sample.url);
    if (!response.ok) throw await problemOf(response);
    const picture = await response.blob();
    if (ticket !== latest) return;
    byId("file").value = "";
    await classify(picture, sample.note || sample.title, ticket);
    if (ticket === latest) button.setAttribute("aria-pressed", "true");
  } catch (problem) {
    if (ticket === latest) trouble(problem);
  }
}

function begin() {
  latest += 1;
  pending?.abort();
  pending = new AbortController();
  for (const button of document.querySelectorAll(".strip button")) button.setAttribute("aria-pressed", "false");
  byId("answer").setAttribute("aria-busy", "true");
  return latest;
}

async function classify(picture, caption, ticket = begin()) {
  preview(picture, caption);
  const form = new FormData();
  // Without its type, which browsers guess from the file's name: the server looks at the content.
  form.append("image", new Blob([picture]), "image");
  try {
    const response = await fetch("classify", { method: "POST", body: form, signal: pending.signal });
    if (!response.ok) throw await problemOf(response);
    const answer = await response.json();
    if (ticket === latest) show(answer);
  } catch (problem) {
    if (ticket === latest) trouble(problem);
  }
}

function preview(picture, caption) {
  const image = byId("preview");
  if (image.src) URL.revokeObjectURL(image.src);
  image.onload = () => {
    image.classList.toggle("small", Math.max(image.naturalWidth, image.naturalHeight) <= 96);
    image.hidden = false;
    byId("invite").hidden = true;
    byId("drop").classList.add("filled");
    const { height, width } = model?.manifest.input ?? {};
    if (width && (image.naturalWidth !== width || image.naturalHeight !== height)) {
      byId("caption").textContent =
        `${caption}, ${image.naturalWidth} × ${image.naturalHeight} pixels; the model sees it at ${width} × ${height}`;
    }
  };
  image.onerror = () => {
    image.hidden = true;
    byId("invite").hidden = false;
    byId("drop").classList.remove("filled");
  };
  image.src = URL.createObjectURL(picture);
  image.alt = caption;
  byId("caption").textContent = caption;
}

function trouble(problem) {
  const { code, message, request_id } = problem.code
    ? problem
    : { code: "no answer", message: "The server does not answer.", request_id: null };
  shown = null;
  byId("answer").setAttribute("aria-busy", "false");
  byId("empty").hidden = true;
  byId("result").hidden = true;
  byId("trouble").hidden = false;
  byId("trouble-title").textContent = "Not classified";
  byId("trouble-text").textContent = message;
  byId("trouble-id").textContent = request_id ? `${code} · request ${request_id}` : code;
  reveal("trouble");
}

function show(answer) {
  shown = answer;
  byId("answer").setAttribute("aria-busy", "false");
  byId("empty").hidden = true;
  byId("trouble").hidden = true;
  byId("result").hidden = false;

  const fpr = answer.detector.fpr;
  byId("verdict").className = `verdict ${answer.accepted ? "accepted" : "rejected"}`;
  byId("verdict-title").textContent = answer.accepted ? "Accepted" : "Rejected";
  byId("verdict-text").textContent = answer.accepted
    ? "Nothing unusual. That does not mean the class is right."
    : `${answer.reasons.map((reason) => REASONS[reason] ?? reason).join(" ")} About ${short(fpr)} of clean images are rejected too.`;

  byId("class-name").textContent = answer.class_name;
  byId("probability").textContent = percent(answer.probability);
  byId("top").replaceChildren(...answer.top.map(topClass));

  const { score, threshold } = answer.detector;
  const line = byId("score-line");
  if (score === undefined || score === null) {
    line.textContent = "This server does not show scores.";
    if (answer.reasons.includes("not_finite")) line.textContent = "The score is not a finite number.";
  } else {
    const relation = score <= threshold ? "within" : "above";
    line.replaceChildren(
      element("b", {}, digits(score)), `, ${relation} the threshold of `, element("b", {}, digits(threshold)),
    );
  }
  const name = DETECTORS[answer.detector.name] ?? answer.detector.name;
  byId("plot-caption").textContent =
    `${name}. Bars: clean images from calibration (square-root scale), ${short(fpr)} of them beyond the threshold.`;
  plot();

  byId("radii").replaceChildren(
    radius("l2", "Up to this total change", answer.certificate.l2, answer.accepted),
    radius("l∞", "Up to this change of every pixel", answer.certificate.linf, answer.accepted),
  );
  byId("json").textContent = JSON.stringify(answer, null, 2);
  reveal("verdict");
}

/* On a narrow screen the answer lies below the samples. */
function reveal(id) {
  if (byId(id).getBoundingClientRect().bottom > window.innerHeight) byId("answer").scrollIntoView();
}

function topClass({ class_name, probability }) {
  const fill = element("i");
  fill.style.width = `${100 * probability}%`;
  return element(
    "li", {},
    element("span", { class: "label", title: class_name }, class_name),
    element("span", { class: "track" }, fill),
    element("span", { class: "share" }, percent(probability)),
  );
}

function sentence({ kind, violation_rate, violation_upper, alpha }) {
  const broken = violation_rate === undefined ? "" :
    `; on held-out images they broke ${short(violation_rate)} (at most ${short(violation_upper)} with 95% confidence)`;
  if (kind === "estimate") return `A fit to attacks, not certified${broken}.`;
  if (kind === "conformal") {
    return `Set for attacks to break at most ${short(alpha)} of such radii, not certified${broken}.`;
  }
  if (kind === "probabilistic") return `Certified, with an error of at most ${short(alpha)}.`;
  return "Certified: no change this small can change the answer.";
}

function amount(entry, norm) {
  if (entry.unbounded) return ["unbounded", ""];
  const text = digits(entry.radius);
  return [text, norm === "l∞" && entry.radius > 0 ? ` = ${digits(255 * entry.radius)}\u00a0/\u00a0255` : ""];
}

function radius(norm, what, entry, accepted) {
  const head = element("header", {}, element("span", { class: "norm" }, norm));
  head.append(element("span", { class: `kind ${entry.kind}` }, entry.kind));
  const [text, also] = amount(entry, norm);
  const value = element("div", { class: "value" }, text);
  if (also) value.append(element("small", {}, also));
  const box = element("section", { "aria-label": `${norm} radius` }, head, value);
  if (!accepted) {
    box.append(element("p", {}, "A rejected image carries no radius."));
    return box;
  }
  box.append(element("p", {}, `${what}, the answer should hold. ${sentence(entry)}`));
  for (const other of entry.others) {
    box.append(element("p", {}, `Also ${amount(other, norm).join("")}, ${other.kind}. ${sentence(other)}`));
  }
  return box;
}

/* Bins are drawn equally wide, whatever their edges: a histogram over several decades stays readable. */
function position(edges, value) {
  const last = edges.length - 1;
  if (value <= edges[0]) return 0;
  for (let bin = 0; bin < last; bin += 1) {
    if (value < edges[bin + 1]) return (bin + (value - edges[bin]) / (edges[bin + 1] - edges[bin])) / last;
  }
  return 1;
}

function anchored(x, width, text, y, name) {
  const half = 3.6 * text.length;
  const at = Math.min(Math.max(x, half), width - half);
  return drawn("text", { x: at, y, "text-anchor": "middle", class: name }, text);
}

function plot() {
  const place = byId("plot");
  if (!shown || !model) return;
  const { edges, counts } = model.calibration.histogram;
  const { score, threshold } = shown.detector;
  const width = Math.max(place.clientWidth, 200);
  const top = 22;
  const base = 108;
  const verdict = shown.accepted ? "accepted" : "rejected";
  const known = score !== undefined && score !== null;
  const label = known ? `Histogram of clean scores; this image has ${digits(score)}, the threshold is ${digits(threshold)}` : "Histogram of clean scores";
  const picture = drawn("svg", { viewBox: `0 0 ${width} 132`, role: "img", "aria-label": label });
  const peak = Math.sqrt(Math.max(...counts, 1));
  const slot = width / counts.length;
  const limit = position(edges, threshold) * width;
  counts.forEach((count, bin) => {
    const height = count ? Math.max(1.5, (base - top) * (Math.sqrt(count) / peak)) : 0;
    const middle = (bin + 0.5) * slot;
    const kind = middle > limit ? "bar-rejected" : "bar-clean";
    picture.append(drawn("rect", {
      x: bin * slot + 0.5, y: base - height, width: Math.max(slot - 1, 0.5), height, rx: Math.min(2, slot / 4), class: kind,
    }));
  });
  picture.append(drawn("line", { x1: 0, x2: width, y1: base + 0.5, y2: base + 0.5, class: "axis" }));
  picture.append(drawn("line", { x1: limit, x2: limit, y1: top - 4, y2: base, class: "threshold" }));
  picture.append(anchored(limit, width, `threshold ${digits(threshold)}`, 12, ""));
  if (known) {
    const beyond = score > edges[edges.length - 1];
    const x = position(edges, score) * width;
    picture.append(drawn("line", { x1: x, x2: x, y1: top + 6, y2: base + 4, class: `here ${verdict}` }));
    picture.append(drawn("circle", { cx: x, cy: top + 6, r: 4.5, class: `dot ${verdict}` }));
    picture.append(anchored(x, width, `this image ${digits(score)}${beyond ? " →" : ""}`, 126, verdict));
  }
  place.replaceChildren(picture);
}

function take(files) {
  const file = [...files].find((candidate) => candidate.type.startsWith("image/")) ?? files[0];
  if (file) classify(file, file.name);
}

// Otherwise the same file, chosen again after an error, would be no change.
byId("file").addEventListener("click", (event) => { event.target.value = ""; });
byId("file").addEventListener("change", (event) => take(event.target.files));
window.addEventListener("paste", (event) => take(event.clipboardData?.files ?? []));
for (const name of ["dragenter", "dragover"]) {
  window.addEventListener(name, (event) => {
    event.preventDefault();
    byId("drop").classList.add("over");
  });
}
for (const name of ["dragleave", "drop"]) {
  window.addEventListener(name, (event) => {
    event.preventDefault();
    byId("drop").classList.remove("over");
  });
}
window.addEventListener("drop", (event) => take(event.dataTransfer.files));
new ResizeObserver(plot).observe(byId("plot"));
connect();
