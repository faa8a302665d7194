// Requests to the console's back end, and errors in the API's shape.

const LOST = "No answer from KubeAI. Is it still running?";

/** The URL of a path of the console's API, such as "models/chat". */
export function consoleUrl(path) {
  return new URL(`api/${path}`, document.baseURI);
}

/** The base URL of the public API, as clients use it. */
export function publicUrl(path = "") {
  return `${location.origin}/openai/v1${path}`;
}

let needsKey = false;

/** Whether clients of the public API need a key; the page learns it with the state. */
export function requireKey(needed) {
  needsKey = needed;
}

export function isKeyRequired() {
  return needsKey;
}

/** `send` a request to the public API. With keys, it goes through the console's path, where the
 * gateway takes the key from the cookie, which this page cannot read. */
export function infer(path, options) {
  if (!needsKey) return send(publicUrl(path), options);
  const headers = { ...options.headers, "X-KubeAI-UI": "1" };
  return send(`${location.origin}/ui/openai/v1${path}`, { ...options, headers });
}

/** Remove the cookie with the key; the gateway then answers with the login form. */
export async function logOut() {
  await fetch(new URL("logout", document.baseURI), { method: "POST", redirect: "manual" });
  location.reload();
}

/** A request that failed; `message` is the API's, `status` is 0 without an answer. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.name = "ApiError";
    this.status = status;
  }
}

/** `fetch`, which raises ApiError for a status other than 2xx and for a lost connection. */
export async function send(url, options = {}) {
  let response;
  try {
    response = await fetch(url, { credentials: "same-origin", redirect: "error", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(LOST);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** GET JSON from the console's API. */
export async function get(path, signal) {
  const response = await send(consoleUrl(path), { signal });
  return response.json();
}

/** Change something through the console's API. The header shows that this page sent it. */
export async function change(method, path, body, type = "application/json") {
  const response = await send(consoleUrl(path), {
    method,
    body: type === "application/json" ? JSON.stringify(body ?? {}) : body,
    headers: { "Content-Type": type, "X-KubeAI-UI": "1" },
  });
  return response.json().catch(() => ({}));
}

async function refusal(response) {
  // The key has been revoked or has expired. The gateway answers a reload with the login form.
  if (needsKey && response.status === 401) location.reload();
  const text = await response.text().catch(() => "");
  return new ApiError(messageOf(text) || `HTTP status ${response.status}`, response.status);
}

/** The message of an error in OpenAI's shape; other text is returned as it is, shortened. */
export function messageOf(text) {
  try {
    const found = JSON.parse(text);
    const error = found.error ?? found;
    return String(typeof error === "string" ? error : error.message ?? text).slice(0, 4000);
  } catch {
    return text.trim().slice(0, 4000);
  }
}
