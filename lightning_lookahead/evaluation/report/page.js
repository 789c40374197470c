// Shows the value that is nearest to the pointer. Texts come from the run's files: they are set as text, never as HTML.
const tip = document.getElementById("tip");

for (const svg of document.querySelectorAll("svg[data-points]")) {
  const points = JSON.parse(svg.dataset.points); // thousandths of the width, pixels, text
  const ring = svg.querySelector(".pointed");

  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const away = ([x, y]) =>
      Math.hypot(3 * (box.left + (x * box.width) / 1000 - event.clientX), box.top + y - event.clientY);
    const [x, y] = points.reduce((best, point) => (away(point) < away(best) ? point : best));
    ring.setAttribute("cx", `${x / 10}%`);
    ring.setAttribute("cy", y);
    ring.setAttribute("visibility", "visible");
    const here = points.filter((point) => point[0] === x && point[1] === y); // theta and phi may agree
    tip.textContent = here.map((point) => point[2]).join("\n");
    tip.hidden = false;
    const left = box.left + (x * box.width) / 1000 + 14;
    tip.style.left = `${Math.max(8, Math.min(left, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.max(8, box.top + y - tip.offsetHeight - 14)}px`;
  };
  const hide = () => {
    ring.setAttribute("visibility", "hidden");
    tip.hidden = true;
  };

  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}
