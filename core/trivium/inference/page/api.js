// What the page asks of the server. Errors are sentences: what the server said, or that it cannot be reached.

export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function refusal(response) {
  try {
    return new Refused((await response.json()).error.message, response.status);
  } catch {
    return new Refused(`the server answered ${response.status}`, response.status);
  }
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("the server cannot be reached", 0);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

export async function call(method, path, body) {
  const options = { method };
  if (body !== undefined) {
    options.headers = { "Content-Type": "application/json" };
    options.body = JSON.stringify(body);
  }
  return (await ask(path, options)).json();
}

// The chunks of a stream of server-sent events, as objects. A stream that ends without [DONE] was cut off.
export async function* streamed(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new Refused("the connection was lost; the turn is not kept", 0);
      }
      if (part.done) throw new Refused("the answer was cut off; the turn is not kept", 0);
      held += part.value;
      const events = held.split(/\r?\n\r?\n/);
      held = events.pop();
      for (const event of events) {
        const data = event.split(/\r?\n/).filter((l) => l.startsWith("data:")).map((l) => l.slice(5).trim()).join("\n");
        if (data === "[DONE]") return;
        if (!data) continue;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Refused(chunk.error.message, 500);
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
