// Markdown as elements. What a model wrote becomes text nodes and nothing else: there is no innerHTML here, and a link
// is one only if a browser, too, takes it for http or https.

const LONGEST = 20000; // characters of a paragraph that is searched for emphasis; a longer one is shown as it is
const INLINE =
  /(`+)(?!`)(.*?[^`])\1(?!`)|\*\*(?=\S)(.*?\S)\*\*|~~(?=\S)(.*?\S)~~|\*(?=[^\s*])(.*?[^\s*])\*(?!\*)|(?<!\w)_(?=[^\s_])(.*?[^\s_])_(?!\w)|\[([^\]]+)\]\(([^\s()]+)\)|(https?:\/\/[^\s<>"')\]]*[^\s<>"')\].,;:!?])/s;

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value != null) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function safe(address) {
  try {
    const found = new URL(address);
    return ["http:", "https:"].includes(found.protocol) ? found.href : null;
  } catch {
    return null;
  }
}

function link(text, address) {
  const href = safe(address);
  if (href === null) return null;
  return element("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, text);
}

function lines(text) {
  const parts = [];
  text.split("\n").forEach((line, i) => {
    if (i) parts.push(element("br"));
    if (line) parts.push(line);
  });
  return parts;
}

function inline(text, depth = 0) {
  const parts = [];
  let rest = text;
  while (rest && depth < 6 && text.length <= LONGEST) {
    const found = INLINE.exec(rest);
    if (!found) break;
    const [whole, , code, strong, gone, star, under, label, address, bare] = found;
    parts.push(...lines(rest.slice(0, found.index)));
    if (code !== undefined) parts.push(element("code", {}, code));
    else if (strong !== undefined) parts.push(element("strong", {}, ...inline(strong, depth + 1)));
    else if (gone !== undefined) parts.push(element("del", {}, ...inline(gone, depth + 1)));
    else if (label !== undefined) parts.push(link(label, address) ?? whole);
    else if (bare !== undefined) parts.push(link(bare, bare) ?? bare);
    else parts.push(element("em", {}, ...inline(star ?? under, depth + 1)));
    rest = rest.slice(found.index + whole.length);
  }
  parts.push(...lines(rest));
  return parts;
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])( *\1){2,}\s*$/;

function codeBlock(text, language) {
  const copy = element("button", { type: "button", class: "copy", onclick: () => navigator.clipboard?.writeText(text) }, "Copy");
  const name = element("span", {}, language || "text");
  return element("figure", { class: "code" }, element("figcaption", {}, name, copy),
    element("pre", { tabindex: "0" }, element("code", {}, text)));
}

function list(items) {
  // items: [indent, mark, text]; deeper ones go into the item before them
  const ordered = /\d/.test(items[0][1]);
  const made = element(ordered ? "ol" : "ul", ordered ? { start: parseInt(items[0][1], 10) } : {});
  const base = items[0][0];
  for (let i = 0; i < items.length; ) {
    let end = i + 1;
    while (end < items.length && items[end][0] > base) end += 1;
    const item = element("li", {}, ...inline(items[i][2]));
    if (end > i + 1) item.append(list(items.slice(i + 1, end).map(([n, m, t]) => [Math.min(n, base + 40), m, t])));
    made.append(item);
    i = end;
  }
  return made;
}

export function markdown(text, depth = 0) {
  const made = document.createDocumentFragment();
  const all = text.replace(/\r\n?/g, "\n").split("\n");
  let paragraph = [];
  const flush = () => {
    if (paragraph.length) made.append(element("p", {}, ...inline(paragraph.join("\n"))));
    paragraph = [];
  };
  for (let i = 0; i < all.length; i += 1) {
    const line = all[i];
    const fence = FENCE.exec(line);
    const heading = HEADING.exec(line);
    if (fence) {
      flush();
      const body = [];
      const ends = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
      for (i += 1; i < all.length && !ends.test(all[i]); i += 1) body.push(all[i]);
      made.append(codeBlock(body.join("\n"), fence[2]));
    } else if (heading) {
      flush();
      made.append(element(`h${Math.min(6, heading[1].length + 2)}`, {}, ...inline(heading[2])));
    } else if (RULE.test(line)) {
      flush();
      made.append(element("hr"));
    } else if (line.startsWith(">") && depth < 6) {
      flush();
      const quoted = [];
      for (; i < all.length && all[i].startsWith(">"); i += 1) quoted.push(all[i].replace(/^> ?/, ""));
      i -= 1;
      made.append(element("blockquote", {}, markdown(quoted.join("\n"), depth + 1)));
    } else if (ITEM.test(line)) {
      flush();
      const items = [];
      for (; i < all.length; i += 1) {
        const item = ITEM.exec(all[i]);
        if (item && items.length < 2000) items.push([item[1].length, item[2], item[3]]);
        else if (items.length && /^\s+\S/.test(all[i]) && !FENCE.test(all[i])) items.at(-1)[2] += `\n${all[i].trim()}`;
        else break;
      }
      i -= 1;
      made.append(list(items.map(([n, m, t]) => [Math.min(n, 12), m, t])));
    } else if (!line.trim()) {
      flush();
    } else {
      paragraph.push(line);
    }
  }
  flush();
  return made;
}
