{{- define "shardmesh.fetch.spec" -}}
backoffLimit: 6
template:
  metadata:
    labels:
      {{- include "shardmesh.podLabels" (list . "model") | nindent 6 }}
      shardmesh.dev/mounts: model
  spec:
    # Each try is a pod of its own, and stays: with OnFailure the last failure would take the log with it.
    restartPolicy: Never
    serviceAccountName: {{ include "shardmesh.name" (list . "worker") }}
    automountServiceAccountToken: false
    enableServiceLinks: false
    securityContext:
      {{- include "shardmesh.podSecurity" . | nindent 6 }}
    {{- with include "shardmesh.scheduling" (list . "coordinator" true) }}
    {{- . | nindent 4 }}
    {{- end }}
    containers:
      - name: fetch
        image: {{ include "shardmesh.image" (list . .Values.coordinator.image) }}
        imagePullPolicy: {{ .Values.image.pullPolicy }}
        command: [python, -c]
        args:
          - |
            {{- .Files.Get "files/fetch.py" | trim | nindent 12 }}
          - {{ .Values.model.hubId | quote }}
          - {{ .Values.model.revision | quote }}
          - {{ include "shardmesh.model.path" . | quote }}
        {{- $token := include "shardmesh.hubTokenEnv" . }}
        {{- if or $token .Values.coordinator.extraEnv }}
        env:
          {{- with $token }}
          {{- . | nindent 10 }}
          {{- end }}
          {{- with .Values.coordinator.extraEnv }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
        {{- end }}
        {{- include "shardmesh.environment" . | nindent 8 }}
        securityContext:
          {{- include "shardmesh.containerSecurity" . | nindent 10 }}
        resources:
          requests: {cpu: 100m, memory: 256Mi}
          limits: {memory: 2Gi}
        volumeMounts:
          {{- include "shardmesh.scratchMounts" . | nindent 10 }}
          - name: model
            mountPath: /models
    volumes:
      {{- include "shardmesh.scratchVolumes" . | nindent 6 }}
      {{- include "shardmesh.model.volume" . | nindent 6 }}
{{- end -}}
