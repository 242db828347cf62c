// The server's side of a conversation: requests, their streams, and Markdown.

/** A fault with the sentence that the server, or the network, gave for it. */
export class Fault extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

function headers(key) {
  const found = { "content-type": "application/json" };
  if (key) found.authorization = `Bearer ${key}`;
  return found;
}

async function faultOf(response) {
  let message = `the server answered with ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // no JSON: the status has to do
  }
  return new Fault(message, response.status);
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Fault("the server cannot be reached");
  }
  if (!response.ok) throw await faultOf(response);
  return response;
}

/** What the server tells of the model. */
export async function about(key) {
  return (await request("/v1/abyssal/about", { headers: headers(key) })).json();
}

/** HTML of a text, made and cleaned by the server. */
export async function markdown(text, key) {
  const body = JSON.stringify({ text });
  const response = await request("/v1/abyssal/markdown", { method: "POST", headers: headers(key), body });
  return (await response.json()).html;
}

/** The chunks of the answer to `body`, as they come. */
export async function* chunks(body, key, signal) {
  const options = { method: "POST", headers: headers(key), signal };
  options.body = JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } });
  const response = await request("/v1/chat/completions", options);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Fault(chunk.error.message);
    yield chunk;
  }
  throw new Fault("the connection broke off");
}

/** The data of server-sent events, one line each. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  }
}
