// The two dialogs: confirm a deletion, and apply a manifest.

import { change } from "./api.js";
import { setText } from "./dom.js";
import { plural } from "./format.js";
import { complain, say } from "./notices.js";

const MANIFEST_MAX_BYTES = 1 << 20;

const confirmation = document.getElementById("confirm");
const applying = document.getElementById("apply");
const manifest = document.getElementById("manifest");
const refusal = document.getElementById("apply-error");
const submit = document.getElementById("apply-submit");

/** Ask before a Model is deleted; resolves to whether it was deleted. */
export async function deleteModel(model) {
  setText(document.getElementById("confirm-title"), `Delete ${model.name}?`);
  const { ready } = model.replicas;
  const pods = ready ? `its ${plural(ready, "ready replica")}` : "its replicas";
  setText(document.getElementById("confirm-text"),
    `This deletes the Model and ${pods}. Requests in flight are cut off.`);
  confirmation.returnValue = "";
  confirmation.showModal();
  await new Promise((closed) => confirmation.addEventListener("close", closed, { once: true }));
  if (confirmation.returnValue !== "delete") return false;
  try {
    await change("DELETE", `models/${encodeURIComponent(model.name)}`);
    say(`${model.name} is being deleted.`);
    return true;
  } catch (error) {
    complain(`${model.name} was not deleted: ${error.message}`);
    return false;
  }
}

/** Open the dialog to apply a manifest, with a text if one was dropped on the page. */
export function openApply(text = null) {
  if (text !== null) manifest.value = text;
  setText(refusal, "");
  if (!applying.open) applying.showModal();
  manifest.focus();
}

async function readFile(file) {
  if (file.size > MANIFEST_MAX_BYTES) {
    openApply();
    setText(refusal, `${file.name} is larger than 1 MiB.`);
    return;
  }
  openApply(await file.text());
}

async function apply() {
  if (submit.getAttribute("aria-disabled") === "true") return;
  if (!manifest.value.trim()) {
    setText(refusal, "Enter a manifest first.");
    return;
  }
  submit.setAttribute("aria-disabled", "true");
  setText(refusal, "");
  try {
    const { applied } = await change("POST", "apply", manifest.value, "application/yaml");
    say(`Applied: ${(applied ?? []).join(", ")}`);
    manifest.value = "";
    applying.close();
  } catch (error) {
    setText(refusal, error.message);
  } finally {
    submit.removeAttribute("aria-disabled");
  }
}

/** Connect the buttons, and let files be dropped anywhere on the page. */
export function setUpDialogs(mayApply) {
  submit.addEventListener("click", apply);
  manifest.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) apply();
  });
  const input = document.getElementById("manifest-file");
  document.getElementById("manifest-choose").addEventListener("click", () => input.click());
  input.addEventListener("change", () => {
    if (input.files[0]) readFile(input.files[0]);
    input.value = "";
  });
  for (const button of document.querySelectorAll("dialog [data-close]")) {
    button.addEventListener("click", () => button.closest("dialog").close(button.dataset.close));
  }
  // The Playground's own drop areas stop these events.
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    const file = event.dataTransfer?.files[0];
    if (file && mayApply()) readFile(file);
  });
}
