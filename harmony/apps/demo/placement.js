// The value is the box "x0,y0,x1,y1" in pixels of the photograph; props.width and props.height are the photograph's.
let grip = null, box = [];
const object = () => element.querySelector(".cut-out");
const photo = () => element.querySelector(".photo");
const read = () => (box = props.value ? props.value.split(",").map(Number) : []);

function show() {
  const [x0, y0, x1, y1] = box, style = object()?.style;
  if (!style) return;
  style.display = box.length === 4 ? "block" : "none";
  if (box.length !== 4) return;
  style.left = `${100 * x0 / props.width}%`;
  style.top = `${100 * y0 / props.height}%`;
  style.width = `${100 * (x1 - x0) / props.width}%`;
  style.height = `${100 * (y1 - y0) / props.height}%`;
}

function keep() {  // rounded to pixels of the photograph
  props.value = box.map(Math.round).join(",");
  read();
  show();
  trigger("change");
}

function move([x0, y0, x1, y1], dx, dy) {  // the center stays in the photograph
  const limit = (low, high, shift, length) => Math.min(Math.max(shift, -(low + high) / 2), length - (low + high) / 2);
  const x = limit(x0, x1, dx, props.width), y = limit(y0, y1, dy, props.height);
  box = [x0 + x, y0 + y, x1 + x, y1 + y];
}

function scale([x0, y0, x1, y1], factor, fx, fy) {  // about the point at the shares fx, fy of the box
  const w = x1 - x0, h = y1 - y0, longest = 2 * Math.max(props.width, props.height);
  const f = Math.min(Math.max(factor, 8 / Math.min(w, h)), longest / Math.max(w, h));
  const px = x0 + fx * w, py = y0 + fy * h;
  box = [px - fx * w * f, py - fy * h * f, px + (1 - fx) * w * f, py + (1 - fy) * h * f];
}

element.addEventListener("pointerdown", (event) => {
  if (!event.target.closest(".cut-out")) return;
  event.preventDefault();
  object().focus({ focusVisible: false });
  element.setPointerCapture(event.pointerId);
  const corner = event.target.tagName === "I" ? event.target.dataset : null;
  grip = { x: event.clientX, y: event.clientY, box: read(), corner: corner && [Number(corner.x), Number(corner.y)] };
});

element.addEventListener("pointermove", (event) => {
  if (!grip) return;
  const pixel = props.width / photo().getBoundingClientRect().width;
  const dx = (event.clientX - grip.x) * pixel, dy = (event.clientY - grip.y) * pixel;
  if (!grip.corner) move(grip.box, dx, dy);
  else {
    const [cx, cy] = grip.corner, [x0, y0, x1, y1] = grip.box;
    const growth = Math.max((cx ? dx : -dx) / (x1 - x0), (cy ? dy : -dy) / (y1 - y0));
    scale(grip.box, 1 + growth, 1 - cx, 1 - cy);
  }
  show();
});

for (const end of ["pointerup", "pointercancel"]) {
  element.addEventListener(end, () => {
    if (grip) keep();
    grip = null;
  });
}

element.addEventListener("keydown", (event) => {
  const step = Math.max(1, props.width / 100);
  const ways = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
  const sizes = { "+": 1.05, "=": 1.05, "-": 1 / 1.05 };
  if (!event.target.closest(".cut-out") || !(event.key in ways || event.key in sizes)) return;
  event.preventDefault();
  if (event.key in ways) move(read(), ...ways[event.key]);
  else scale(read(), sizes[event.key], 0.5, 1);
  keep();
  object().focus();
});

watch(["value", "photo", "cut_out"], () => { read(); show(); });
read();
show();
