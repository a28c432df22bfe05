"use strict";
// Details of the token under the pointer or the focus, arrow keys, and the legend's spotlights. Texts go in by textContent only.
(() => {
  const tip = document.getElementById("tip");
  const part = (name) => tip.querySelector(`[data-part=${name}]`);
  const unseen = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu;
  const named = { "\n": "\\n", "\t": "\\t", "\r": "\\r" };
  const escaped = (text) => text.replace(unseen, (c) => named[c] ?? `\\u{${c.codePointAt(0).toString(16)}}`);

  let shown = null;

  const hide = () => { shown = null; tip.hidden = true; };

  const place = () => {
    const box = [...shown.getClientRects()].find((r) => r.width > 0) ?? shown.getBoundingClientRect();
    const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
    const below = box.bottom + 8;
    const above = Math.max(8, box.top - tip.offsetHeight - 8);
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${below + tip.offsetHeight < window.innerHeight ? below : above}px`;
  };

  const show = (section, tokens, token) => {
    const { e, w, i, t } = token.dataset;
    const button = section.querySelector(`.legend [data-e="${e}"]`);
    tip.className = `e${e}`;
    part("letter").textContent = button.querySelector(".key").textContent;
    part("expert").textContent = button.querySelector(".name").textContent;
    part("text").textContent = t === "id" ? "(not decoded)" : token.textContent === "" ? "(no text of its own)" : `"${escaped(token.textContent)}"`;
    part("weight").textContent = `${(100 * Number(w)).toFixed(1)}%`;
    const overruled = token.classList.contains("o");
    part("overruled").textContent = overruled ? "yes, not the expert's first choice" : "no";
    part("overruled").classList.toggle("yes", overruled);
    part("id").textContent = i;
    part("place").textContent = `${tokens.indexOf(token) + 1} of ${tokens.length}`;
    tip.hidden = false;
    shown = token;
    place();
  };

  const next = {
    ArrowRight: (tokens, at) => at + 1,
    ArrowLeft: (tokens, at) => at - 1,
    Home: () => 0,
    End: (tokens) => tokens.length - 1,
    ArrowDown: (tokens, at) => tokens.findIndex((token, n) => n > at && token.classList.contains("s")),
    ArrowUp: (tokens, at) => tokens.findLastIndex((token, n) => n < at && token.classList.contains("s")),
  };

  for (const section of document.querySelectorAll(".trace")) {
    const response = section.querySelector(".response");
    const tokens = [...response.querySelectorAll(".t")];
    const tokenOf = (event) => event.target.closest?.(".t");
    let focused = null;
    const over = (event) => { const token = tokenOf(event); if (token) show(section, tokens, token); };
    response.addEventListener("mouseover", over);
    response.addEventListener("mouseout", () => { if (focused) show(section, tokens, focused); else hide(); });
    response.addEventListener("focusin", (event) => {
      const token = tokenOf(event);
      if (!token) return;
      for (const other of response.querySelectorAll('.t[tabindex="0"]')) other.tabIndex = -1;
      token.tabIndex = 0;
      token.setAttribute("aria-describedby", "tip");
      focused = token;
      show(section, tokens, token);
    });
    response.addEventListener("focusout", (event) => { tokenOf(event)?.removeAttribute("aria-describedby"); focused = null; hide(); });
    response.addEventListener("keydown", (event) => {
      const at = tokens.indexOf(event.target);
      if (at < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
      const to = next[event.key]?.(tokens, at);
      if (to === undefined) return;
      event.preventDefault();
      tokens[to]?.focus();
    });
    section.querySelector(".legend")?.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      const on = button.getAttribute("aria-pressed") !== "true";
      for (const other of section.querySelectorAll(".legend button")) other.setAttribute("aria-pressed", String(on && other === button));
      const lit = button.dataset.e === "o" ? (token) => token.classList.contains("o") : (token) => token.dataset.e === button.dataset.e;
      for (const token of tokens) token.classList.toggle("dim", on && !lit(token));
    });
    section.querySelector(".options input").addEventListener("change", (event) => {
      response.classList.toggle("letters", event.target.checked);
    });
  }
  window.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  for (const moved of ["scroll", "resize"]) window.addEventListener(moved, () => { if (shown) place(); }, { passive: true });
})();
