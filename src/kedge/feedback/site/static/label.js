// What the pages do beyond forms: keys, time in view, and one answer for one click. Everything works without it.
"use strict";

(function () {
  document.documentElement.classList.add("js");
  const form = document.getElementById("answer");
  const undo = document.getElementById("undo");
  const STORED = "kedge-shortcuts";

  // A form is sent once: a second click or key changes nothing until the page is loaded again.
  for (const one of document.querySelectorAll("form[method=post]")) {
    one.addEventListener("submit", function (event) {
      if (one.dataset.sent) {
        event.preventDefault();
      }
      one.dataset.sent = "yes";
    });
  }
  addEventListener("pageshow", function () {
    for (const one of document.querySelectorAll("form")) {
      delete one.dataset.sent;
    }
  });

  const box = document.getElementById("shortcuts");
  let enabled = true;
  try {
    enabled = localStorage.getItem(STORED) !== "off";
  } catch (error) {
    // No storage: shortcuts stay on.
  }
  if (box) {
    box.checked = enabled;
    box.addEventListener("change", function () {
      enabled = box.checked;
      try {
        localStorage.setItem(STORED, enabled ? "on" : "off");
      } catch (error) {
        // It counts for this page.
      }
    });
  }

  document.addEventListener("keydown", function (event) {
    if (!enabled || event.ctrlKey || event.metaKey || event.altKey || event.repeat) {
      return;
    }
    const at = event.target;
    if (at.matches("textarea, select, input:not([type=radio]):not([type=checkbox])")) {
      return;
    }
    const control = at.matches("button, a, summary, input");
    if ((event.key === "u" || event.key === "Backspace") && undo) {
      event.preventDefault();
      undo.requestSubmit();
    } else if (event.key === "?") {
      location.href = "/guidelines";
    } else if (form) {
      pressed(event, control);
    }
  });

  if (!form) {
    return;
  }

  // Seconds for which the page was in view, so that a lunch break is no time on task.
  let seen = 0;
  let since = document.visibilityState === "visible" ? performance.now() : null;
  document.addEventListener("visibilitychange", function () {
    if (document.visibilityState === "visible") {
      since = performance.now();
    } else if (since !== null) {
      seen += performance.now() - since;
      since = null;
    }
  });
  form.addEventListener("submit", function () {
    form.elements.active.value = Math.round(seen + (since === null ? 0 : performance.now() - since));
  });

  const kind = form.dataset.kind;
  const save = document.getElementById("save");
  const status = document.getElementById("status");
  const ranks = Array.from(form.querySelectorAll("select[name^=rank_]"));

  function opened() {
    return form.classList.contains("open");
  }

  // After a choice the optional questions appear; where there are none, the choice is the answer.
  function chosen(input) {
    document.querySelectorAll(".side").forEach(function (side, place) {
      side.classList.toggle("chosen", input.value === ["left", "right"][place]);
    });
    if (form.dataset.details === "no") {
      form.requestSubmit(save);
      return;
    }
    form.classList.add("open");
    const label = input.closest("label").querySelector("span").lastChild.textContent.trim();
    status.textContent = (label || input.value) + " chosen. Enter saves.";
  }

  for (const input of form.querySelectorAll("input[name=choice], input[name=rating]")) {
    input.addEventListener("change", function () {
      chosen(input);
    });
  }
  for (const select of ranks) {
    select.addEventListener("change", function () {
      form.classList.toggle("open", ranks.every((one) => one.value));
    });
  }

  function pick(input) {
    if (input.checked && opened()) {
      form.requestSubmit(save);
    } else {
      input.checked = true;
      input.dispatchEvent(new Event("change"));
    }
  }

  // The response whose digit is pressed takes the next free place.
  function rank(place) {
    const next = 1 + Math.max(0, ...ranks.map((one) => Number(one.value)));
    if (!ranks[place].value && next <= ranks.length) {
      ranks[place].value = String(next);
      ranks[place].dispatchEvent(new Event("change"));
      status.textContent = "Response " + (place + 1) + " takes place " + next + ".";
    }
  }

  function pressed(event, control) {
    const input = form.querySelector('input[data-key="' + CSS.escape(event.key) + '"]');
    if (input && (input.name !== "strength" || opened())) {
      event.preventDefault();
      if (input.name === "strength") {
        input.checked = true;
      } else {
        pick(input);
      }
    } else if (kind === "ranking" && /^[1-9]$/.test(event.key) && ranks[event.key - 1]) {
      event.preventDefault();
      rank(event.key - 1);
    } else if (event.key === "Escape" && kind === "ranking") {
      ranks.forEach((one) => (one.value = ""));
      form.classList.remove("open");
    } else if (event.key === "Enter" && (!control || event.target.matches("input"))) {
      event.preventDefault();
      form.requestSubmit(save);
    } else if (event.key === "s" || (event.key === " " && !control)) {
      event.preventDefault();
      const skip = document.getElementById("skip");
      if (skip) {
        form.requestSubmit(skip);
      }
    } else if (event.key === "f") {
      document.getElementById("flag").click();
    }
  }
})();
