// Reads a GGUF file with llama.cpp: node llama_cpp.mjs FOLDER_WITH_NODE_MODULES REQUEST.json ANSWER.json
// The request: {"file": PATH, "texts": [TEXT, ...], "ids": [[ID, ...], ...]}. The answer: the ids of each text, the
// probabilities of all next tokens after each of the given ids, and the tokens that end an answer; or what went wrong.
import {createRequire} from "module";
import {readFileSync, writeFileSync} from "fs";
import {pathToFileURL} from "url";

const [folder, request, written] = process.argv.slice(2);
const find = createRequire(`${folder}/package.json`);
const {getLlama} = await import(pathToFileURL(find.resolve("node-llama-cpp")));
const {file, texts = [], ids = [], vocabulary = 0} = JSON.parse(readFileSync(request, "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});
let answer;
try {
    const model = await llama.loadModel({modelPath: file, checkTensors: true});
    const longest = Math.max(8, ...ids.map((row) => row.length + 1));
    const context = await model.createContext({contextSize: longest, sequences: 1, batchSize: longest, threads: 1});
    const sequence = context.getSequence();
    const probabilities = [];
    for (const row of ids) {
        await sequence.clearHistory();
        const options = {probabilities: true, options: {temperature: 1, topK: 0, topP: 1, minP: 0}};
        const results = await sequence.controlledEvaluate(row.map((id) => [id, {generateNext: options}]));
        probabilities.push(results.map((result) => Object.fromEntries(result.next.probabilities)));
    }
    const tokens = model.tokens;
    answer = {
        tokens: texts.map((text) => model.tokenize(text, true)),
        probabilities,
        begins: tokens.shouldPrependBosToken,
        ends: [...Array(vocabulary).keys()].filter((id) => model.isEogToken(id)),
    };
} catch (error) {
    answer = {error: String(error)};
}
writeFileSync(written, JSON.stringify(answer));
process.exit(0);
