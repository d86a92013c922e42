// Classifies texts with an exported model, in Node.js (onnxruntime-node) and in browsers
// (onnxruntime-web). README.md describes model.json, which this module reads.
import { loadTokenizer } from "./tokenizer.mjs";

const BELOW_ONE = 1 - 2 ** -53; // so that a threshold of 1 sends every text to the last exit
const sum = (values) => values.reduce((total, value) => total + value, 0);
// Functions from the probabilities with temperature, those without, and the learned score to an
// exit confidence; a text with confidence NaN never exits early.
const POLICIES = {
  confidence: (p) => Math.max(...p),
  raw_confidence: (p, raw) => Math.max(...raw),
  entropy: (p) => 1 + sum(p.map((x) => x && x * Math.log(x))) / Math.log(p.length),
  margin: (p) => Math.max(...p) - p.toSorted((a, b) => b - a)[1],
  learning_to_exit: (p, raw, learned) => learned,
};

function softmax(logits, temperature) {
  const scaled = Array.from(logits, (logit) => logit / (temperature ?? NaN));
  const exponents = scaled.map((z) => Math.exp(z - Math.max(...scaled)));
  return exponents.map((exponent) => exponent / sum(exponents));
}

async function read(url) {
  if (url.protocol === "file:") return (await import("node:fs/promises")).readFile(url);
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url} cannot be read: status ${response.status}`);
  return new Uint8Array(await response.arrayBuffer());
}

export class Classifier {
  /** Loads the model at a folder's URL; ort is ONNX Runtime's module, options go to its sessions. */
  static async load(ort, precision = "float32", folder = import.meta.url, options = {}) {
    const file = (name) => read(new URL(name, folder));
    const text = async (name) => new TextDecoder().decode(await file(name));
    const about = JSON.parse(await text("model.json"));
    const plan = about.precisions[precision];
    if (!plan) {
      const known = Object.keys(about.precisions).join(", ");
      throw new Error(`this export has no precision ${precision}: choose from ${known}`);
    }
    const encode = loadTokenizer(await text("tokenizer.json"), about);
    const sessions = [];
    const externalData = [{ path: plan.weights, data: await file(`onnx/${plan.weights}`) }];
    for (const name of plan.graphs) {
      const graph = await file(`onnx/${name}`);
      sessions.push(await ort.InferenceSession.create(graph, { ...options, externalData }));
    }
    return Object.assign(new Classifier(), { ort, about, plan, encode, sessions });
  }

  /** Returns {label, probability, exit, cost, probabilities} for each row, computed one by one. */
  async predict(rows) {
    const answers = [];
    for (const [index, row] of rows.entries()) answers.push(await this.classify(row, index + 1));
    return answers;
  }

  async classify(row, number = 1) {
    const { ort, about, plan } = this;
    const tokens = this.encode(row, number);
    const second = tokens.findIndex((token) => token.text === 1);
    const integers = (values, ...dims) => new ort.Tensor("int32", values, dims);
    const values = {
      input_ids: integers(tokens.map((token) => token.id), 1, tokens.length),
      token_type_ids: integers(tokens.map((token) => token.type), 1, tokens.length),
      tokens: integers([tokens.length], 1),
      // The index where a pair's second text begins; if that is empty, of the token after it.
      second_start: integers([second < 0 ? Math.max(tokens.length - 1, 0) : second], 1),
    };
    for (const { layer, cost, temperature, runs } of plan.stages) {
      let outputs;
      for (const { graph, first_token: first } of runs) {
        values.count = new ort.Tensor("int64", [first ? 1 : tokens.length], [1]);
        const names = this.sessions[graph].inputNames;
        const given = Object.fromEntries(names.map((name) => [name, values[name]]));
        outputs = await this.sessions[graph].run(given);
        // After the first token alone, the next stage computes the other tokens from these states.
        if (!first) values.states = outputs.next_states;
      }
      const [p, raw] = [temperature, 1].map((t) => softmax(outputs.logits.data, t));
      const confidence = POLICIES[about.policy](p, raw, outputs.exit_scores?.data[0]);
      const leaves = Math.min(Math.max(confidence, 0), BELOW_ONE) >= (plan.threshold ?? Infinity);
      if (!leaves && layer !== plan.stages.at(-1).layer) continue;
      const probabilities = temperature === null ? raw : p;
      const probability = Math.max(...probabilities);
      const label = about.classes[Math.max(0, probabilities.indexOf(probability))];
      return { label, probability, exit: layer, cost, probabilities };
    }
  }
}
