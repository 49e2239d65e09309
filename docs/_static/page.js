// Cells know the heading of their column, for windows where a row's cells stand below each other.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.docutils")) {
    const headings = [...table.querySelectorAll("thead th")].map((cell) => cell.textContent.trim());
    for (const cell of table.querySelectorAll("tbody td")) {
      const heading = headings[cell.cellIndex];
      if (heading) cell.dataset.column = heading;
    }
  }
});
