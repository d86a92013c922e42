// Tokenizes texts as the Python library does, according to tokenizer.json and model.json.
import { Tokenizer } from "@huggingface/tokenizers";

// The characters of \w in Rust's regular expressions; JavaScript's \w matches only ASCII.
const WORD = "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\u200c\\u200d";
const WHITESPACE = {
  type: "Split",
  pattern: { Regex: `[${WORD}]+|[^${WORD}\\p{White_Space}]+` },
  behavior: "Removed",
  invert: true,
};

/** Returns a function from a row (one text or two) and its number to its tokens {id, type}. */
export function loadTokenizer(json, { template, truncation, text_columns: columns, ...about }) {
  const words = JSON.parse(json, (key, value) => (value?.type === "Whitespace" ? WHITESPACE : value));
  if (about.split_special_tokens) words.added_tokens = words.added_tokens.filter((t) => !t.special);
  const tokenizer = new Tokenizer(words, { unk_token: words.model.unk_token });
  if (words.model.type === "Unigram") {
    // Word by word, since the library would merge adjacent unknown words into one token.
    const call = tokenizer.model._call.bind(tokenizer.model);
    const split = (parts) => parts.flatMap((part) => part.split(/(?=▁)/));
    tokenizer.model._call = (parts) => split(parts).flatMap((word) => call([word]));
  }
  const room = truncation.max_length - template.filter((part) => "id" in part).length;
  const left = truncation.direction === "left"; // the side that is truncated

  return (row, number) => {
    const texts = Array.isArray(row) ? row : [row];
    if (texts.length !== columns.length || texts.some((text) => !text?.isWellFormed?.()))
      throw new Error(`row ${number} must be ${columns.length > 1 ? "two texts" : "a text"}`);
    const ids = texts.map((text) => tokenizer.encode(text, { add_special_tokens: false }).ids);
    const [first, second = 0] = ids.map((own) => own.length);
    const short = Math.min(first, second, room >> 1); // how many tokens the shorter text keeps
    const sizes = first <= second ? [short, room - short] : [room - short, short];
    const cut = ids.map((own, k) => own.slice(left ? Math.max(0, own.length - sizes[k]) : 0));
    return template.flatMap(
      (part) => cut[part.text]?.slice(0, sizes[part.text]).map((id) => ({ ...part, id })) ?? [part],
    );
  };
}
